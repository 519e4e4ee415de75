"""Reads clips in a process of its own, one JSON line each: a crash then costs one process."""

import json
import pathlib
import resource
import sys
import time

from mm_jax.data.media import MediaSpec, load_media
from mm_jax.data.recording import Clip

SPEC = MediaSpec(num_frames=4, image_size=16)


def main(listing):
    # Damaged headers must not make it take what a machine does not have.
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    for name in pathlib.Path(listing).read_text().splitlines():
        began = time.monotonic()
        for clip in (Clip(pathlib.Path(name)), Clip(pathlib.Path(name), 0.7, 1.3)):
            got = load_media([clip], SPEC)
            assert got.frames.shape == ((4 if got.video_status == "ok" else 0), 16, 16, 3)
            assert (len(got.fbank) > 0) == (got.audio_status == "ok")
            found = {"name": name, "video": got.video_status, "audio": got.audio_status}
            print(json.dumps({**found, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
