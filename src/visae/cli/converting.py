"""The verb ``convert``: SAEs from one form or place to another."""

import dataclasses
from pathlib import Path

import tyro

from visae.cli.output import Screen
from visae.errors import ConfigError
from visae.storage.hub_path import is_hub_path

__all__ = ["ConvertCommand"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Publish an SAE on the model hub, or copy one from there: an SAE → an SAE elsewhere."""

    sae: tyro.conf.Positional[str]
    """Folder of the SAE, or hf://owner/repository/folder."""
    out: str
    """hf://owner/repository[/folder] to publish it, or a new folder for a copy from the hub."""
    private: bool = False
    """Publish for those only whom you let in."""
    license: str | None = None
    """Licence as the hub writes it, such as apache-2.0."""
    dataset: tuple[str, ...] = ()
    """The hub's datasets that the SAE learned from: owner/name."""
    metrics_log: bool = False
    """Publish the figures of every step of the training, too."""
    keep_page: bool = False
    """Leave a README.md that is there as it is."""

    def run(self, screen: Screen) -> None:
        """Publish or copy, and say where the SAE is."""
        if is_hub_path(self.out):
            self._push(screen)
        elif is_hub_path(self.sae):
            self._pull(screen)
        else:
            raise ConfigError(
                "Both are folders on this machine",
                where=f"{self.sae} --out {self.out}",
                fix="Write one of them as hf://owner/repository/folder",
            )

    def _push(self, screen: Screen) -> None:
        from visae.reports.push import PushConfig, push_sae

        config = PushConfig(
            private=self.private,
            license=self.license,
            datasets=self.dataset,
            metrics_log=self.metrics_log,
            keep_page=self.keep_page,
        )
        pushed = push_sae(self.sae, self.out, config=config)
        screen.say(f"Published: {', '.join(pushed.files)}")
        if pushed.redacted:
            screen.say(f"Left out, for it tells of this machine: {', '.join(pushed.redacted)}")
        screen.say(f"Page: {pushed.url}")
        screen.say(f'Load it in Python: load_sae("{pushed.place}")')

    def _pull(self, screen: Screen) -> None:
        from visae.saes.pull import pull_sae

        out = Path(self.out)
        found = pull_sae(self.sae, out)
        screen.say(f"SAE: {out}, from {found.place}; it reproduces its reference codes")
        screen.say(f"Next: visae evaluate --sae {out} --store STORE")
