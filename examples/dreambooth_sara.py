"""DreamBooth with SaRA: teach a Stable Diffusion pipeline one subject from a few images, by its least used weights.

    python -m examples.dreambooth_sara --pretrained sd-legacy/stable-diffusion-v1-5 \\
        --images photos/ --prompt "a photo of sks dog" --class-prompt "a photo of a dog" --output sks-dog

needs `pip install diffusers pillow`. With a class prompt the base model's own images of the class are trained on as
well, so that it keeps what it knew (prior preservation).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sparse_peft import SaRAConfig, SparsityController, sara_learning_rate
from sparse_peft.adapters import load_adapter, save_adapter

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}

console = Console()


def load_images(folder: Path, size: int) -> Tensor:
    """All images of a folder, cut to squares: ``(images, 3, size, size)`` in [-1, 1]."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise typer.BadParameter(f"{folder} has no images ({', '.join(sorted(IMAGE_ENDINGS))})", param_hint="--images")
    squares = [ImageOps.fit(Image.open(file).convert("RGB"), (size, size)) for file in files]
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_images(pipe: StableDiffusionPipeline, pixels: Tensor) -> Tensor:
    """The images' latents, ``(images, channels, height, width)``."""
    means = [pipe.vae.encode(image[None].to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mean for image in pixels]
    return torch.cat(means) * pipe.vae.config.scaling_factor


@torch.no_grad()
def encode_prompt(pipe: StableDiffusionPipeline, prompt: str) -> Tensor:
    """The prompt's embedding, ``(1, tokens, width)``."""
    embedding, _ = pipe.encode_prompt(prompt, pipe.unet.device, 1, do_classifier_free_guidance=False)
    return embedding


@torch.no_grad()
def images_of_class(pipe: StableDiffusionPipeline, prompt: str, count: int, size: int, seed: int) -> Tensor:
    """Images that the base model makes itself, as ``load_images`` gives them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(prompt, height=size, width=size, generator=generator, output_type="pt").images
        for _ in track(range(count), "images of the class", console=console)
    ]
    return torch.cat(images).float() * 2 - 1


@dataclass
class Subject:
    """What is trained on: latents, the prompt's embedding, and how much it counts."""

    latents: Tensor
    embedding: Tensor
    weight: float


def diffusion_loss(unet, scheduler: DDPMScheduler, subject: Subject, batch: int, generator: torch.Generator) -> Tensor:
    """The denoising loss of some of a subject's images, at random times."""
    chosen = torch.randint(len(subject.latents), (batch,), generator=generator)
    clean = subject.latents[chosen].to(unet.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    times = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator).to(clean.device)
    noisy = scheduler.add_noise(clean, noise, times)
    wanted = noise
    if scheduler.config.prediction_type == "v_prediction":
        wanted = scheduler.get_velocity(clean, noise, times)
    predicted = unet(noisy, times, subject.embedding.expand(batch, -1, -1)).sample
    return subject.weight * F.mse_loss(predicted.float(), wanted.float())


def main(
    pretrained: Annotated[str, typer.Option(help="Stable Diffusion pipeline: name on the Hub, or folder.")],
    images: Annotated[Path, typer.Option(help="Folder with a few images of the subject.")],
    prompt: Annotated[str, typer.Option(help="What the images show, such as 'a photo of sks dog'.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("dreambooth-sara"),
    class_prompt: Annotated[str | None, typer.Option(help="For prior preservation: 'a photo of a dog'.")] = None,
    class_images: Annotated[int, typer.Option(help="Number of images of the class.")] = 50,
    threshold: Annotated[float | None, typer.Option(help="Weights with absolute value below it train.")] = None,
    density: Annotated[float | None, typer.Option(help="In place of a threshold: share of the weights.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 800,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step, of the subject and of the class.")] = 1,
    size: Annotated[int, typer.Option(help="Width and height of the images.")] = 512,
    learning_rate: Annotated[float | None, typer.Option(help="By default the authors' for a threshold.")] = None,
    seed: Annotated[int, typer.Option(help="Of noise, times and choices.")] = 0,
) -> None:
    """Train a SaRA adapter of the pipeline's UNet, save it, and check the file on a fresh UNet."""
    if threshold is None and density is None:
        threshold = 2e-3
    pipe = StableDiffusionPipeline.from_pretrained(pretrained, safety_checker=None, requires_safety_checker=False)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    subjects = [Subject(encode_images(pipe, load_images(images, size)), encode_prompt(pipe, prompt), 1.0)]
    if class_prompt is not None:
        own = images_of_class(pipe, class_prompt, class_images, size, seed)
        subjects.append(Subject(encode_images(pipe, own), encode_prompt(pipe, class_prompt), 1.0))

    unet = pipe.unet.requires_grad_(False)
    unet.add_adapter(SaRAConfig(threshold=threshold, density=density, scale=1.0, seed=seed))
    unet.train()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in trained)
    console.print(f"{total:,} of {sum(p.numel() for p in unet.parameters()) - total:,} weights of the UNet train")
    if learning_rate is None:
        learning_rate = 5e-4 if threshold is None else sara_learning_rate(threshold)
    # weight decay pulls a delta to 0: back to the pretrained weight, and not the weight itself to 0
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    controller = SparsityController(unet, optimizer, total_steps=steps)

    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in track(range(steps), "training", console=console):
        loss = sum(diffusion_loss(unet, scheduler, subject, batch, generator) for subject in subjects)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for record in controller.step():
            console.print(f"step {record.step}: {record.frozen:,} weights have grown, and are frozen")
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    tenth = max(1, steps // 10)
    console.print(f"loss {np.mean(losses[:tenth]):.4f} -> {np.mean(losses[-tenth:]):.4f}")

    save_adapter(unet, output)
    unet.eval()
    fresh = StableDiffusionPipeline.from_pretrained(
        pretrained, safety_checker=None, requires_safety_checker=False
    ).unet.to(unet.device)
    load_adapter(fresh, output)
    fresh.eval()
    with torch.no_grad():
        given = subjects[0].latents[:1].to(unet.device), torch.tensor([1], device=unet.device), subjects[0].embedding
        same = torch.equal(unet(*given).sample, fresh(*given).sample)
    console.print(f"saved in {output}; the file gives a fresh UNet the same output: {'yes' if same else 'NO'}")
    if not same:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
