"""How fast activations are recorded and loaded, beside what the machine can do and beside saev.

    .venv/bin/python benchmarks/activations.py                 both parts, about ten minutes
    .venv/bin/python benchmarks/activations.py record --images FOLDER
    .venv/bin/python benchmarks/activations.py load --store-mb 512 --peers none

Prints Markdown tables for RESULTS.md. Runs are interleaved; each ratio is the median of the ratios
of one round. The loaders run in processes of their own, saev's in environments that are made here
(uv, or Python 3.12 with venv): its repository's shuffled loader, and the older one on PyPI.
"""

import argparse
import tempfile
from pathlib import Path

from loading_speed import measure_loading
from measuring import machine
from recording_speed import measure_recording

SAEV = "saev @ git+https://github.com/OSU-NLP-Group/saev@01e709867e2d0c3f35f63a77dfd0e97b20c88147"
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="record, load (default: both)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder to keep (default: a temporary one)")
    recording = parser.add_argument_group("record")
    recording.add_argument("--images", type=Path, help="folder of JPEGs (default: made up)")
    recording.add_argument("--seconds", type=float, default=8, help="of each bare forward")
    recording.add_argument("--models", nargs="+", default=MODELS)
    recording.add_argument("--device", default="auto")
    recording.add_argument("--precision", default="float32", help="bfloat16 on a GPU")
    loading = parser.add_argument_group("load")
    loading.add_argument("--store-mb", type=int, default=2048)
    loading.add_argument("--d-model", type=int, default=384)
    loading.add_argument("--buffer-mb", type=int, default=1024)
    loading.add_argument("--batch-size", type=int, default=4096)
    loading.add_argument("--peers", nargs="+", default=["saev", "saev-0.1.0"], help="or none")
    loading.add_argument("--peer-python", default="3.12", help="version or path for the peers")
    loading.add_argument("--saev", default=SAEV, help="requirement that installs the repository's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        print(f"{machine()}; {arguments.rounds} rounds, medians\n")
        for part in arguments.parts or ("record", "load"):
            {"record": measure_recording, "load": measure_loading}[part](arguments, work)


if __name__ == "__main__":
    main()
