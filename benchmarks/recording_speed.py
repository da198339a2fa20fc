"""The recorder beside the bare forward pass: a part of activations.py."""

import dataclasses
import shutil
import time

import numpy as np
import torch
from measuring import middle, table_row

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.images.opening import open_images
from visae.models.config import ModelConfig
from visae.models.loading import load_model

BLOCK = 9
BATCH = 32
HEADER = (
    *("model", "images", "bare, whole", "bare, to the site", "record", "of whole"),
    *("of to the site", "start, s"),
)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Images per second of one round."""

    whole: float
    to_site: float
    recorded: float
    start: float


def measure_recording(arguments, work):
    print(f"Recording residual@{BLOCK}, all tokens, batches of {BATCH}, {arguments.precision}.\n")
    print(table_row(HEADER), table_row(["---"] * len(HEADER)), sep="\n")
    for name in arguments.models:
        n_images = n_images_for(arguments, work, name)
        rates = [record_round(arguments, work, name, n_images) for _ in range(arguments.rounds)]
        columns = [
            *(f"{middle(getattr(r, key) for r in rates):.1f}" for key in ("whole", "to_site")),
            f"{middle(r.recorded for r in rates):.1f}",
            f"{middle(r.recorded / r.whole for r in rates):.2f}",
            f"{middle(r.recorded / r.to_site for r in rates):.2f}",
            f"{middle(r.start for r in rates):.1f}",
        ]
        print(table_row([name, str(n_images), *columns]), flush=True)
    print()


def record_round(arguments, work, name, n_images):
    """One round: the bare pass whole, to the site, and the recording, on as many images each."""
    config = ModelConfig(model=name, weights=random_weights(work, name))
    model = load_model(config, device=arguments.device)
    network, device = bare_network(config.weights, name, arguments.device)
    source = open_images(str(jpegs(arguments, work, n_images)))
    whole = bare_rate(network.forward_features, device, arguments, n_images)
    to_site = bare_rate(lambda x: up_to_site(network, x), device, arguments, n_images)
    recorded, start = recorded_rate(source, model, config, arguments, work / "recorded")
    return Rates(whole, to_site, recorded, start)


def recorded_rate(source, model, model_config, arguments, out):
    """Images per second from the first batch to the end of the call, and the seconds before."""
    shutil.rmtree(out, ignore_errors=True)
    seen = []

    def progress(now):
        if now.done > 0:
            seen.append((time.perf_counter(), now.done))

    options = {"precision": arguments.precision} if arguments.precision != "float32" else {}
    config = RecordConfig(sites=(f"residual@{BLOCK}",), tokens="all", batch_size=BATCH, **options)
    begun = time.perf_counter()
    record(source, model, out, config=config, model_config=model_config, progress=progress)
    seconds = time.perf_counter() - seen[0][0]
    return (len(source.entries) - seen[0][1]) / seconds, seen[0][0] - begun


@torch.inference_mode()
def bare_rate(forward, device, arguments, n_images):
    pixels = torch.randn(BATCH, 3, 224, 224, device=device)
    half = arguments.precision == "bfloat16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        forward(pixels)
        wait(device)
        start = time.perf_counter()
        for _ in range(n_images // BATCH):
            forward(pixels)
        wait(device)
    return n_images // BATCH * BATCH / (time.perf_counter() - start)


def up_to_site(network, pixels):
    return network.forward_intermediates(
        pixels, indices=[BLOCK], stop_early=True, norm=False, intermediates_only=True
    )


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare_network(weights, name, device):
    import timm
    from safetensors.torch import load_file

    network = timm.create_model(name, num_classes=0).eval()
    network.load_state_dict(load_file(weights))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind if device == "auto" else device)
    return network.to(device), device


def random_weights(work, name):
    import timm
    from safetensors.torch import save_file

    path = work / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file(timm.create_model(name, num_classes=0).state_dict(), path)
    return path


def n_images_for(arguments, work, name):
    """Images that take about ``--seconds`` of bare forward, in whole batches."""
    network, device = bare_network(random_weights(work, name), name, arguments.device)
    rate = bare_rate(network.forward_features, device, arguments, 4 * BATCH)
    return min(128, max(4, round(rate * arguments.seconds / BATCH))) * BATCH


def jpegs(arguments, work, n_images):
    """A folder of as many JPEGs: copies of the user's first ones, or made up with 1/f spectra."""
    folder = work / f"jpegs{n_images}"
    if folder.exists():
        return folder
    folder.mkdir()
    given = arguments.images and sorted(arguments.images.rglob("*.[jJ][pP]*[gG]"))
    for i in range(n_images):
        if given:
            shutil.copy(given[i % len(given)], folder / f"{i:05d}.jpg")
        else:
            made_up_photograph(i).save(folder / f"{i:05d}.jpg", quality=90)
    return folder


def made_up_photograph(seed, height=375, width=500):
    """An image with the 1/f spectrum of photographs, of ImageNet's usual size."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / width)
    spectrum = np.fft.rfft2(generator.standard_normal((3, height, width)))
    grey = np.fft.irfft2(spectrum * amplitude, (height, width))
    grey += grey.mean(0)
    pixels = 128 + 50 * grey / grey.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
