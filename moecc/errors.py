"""The errors a user can cause: one message, one hint, one exit code each."""

from __future__ import annotations


class MoeccError(Exception):
    """A failure the user can act on.

    Attributes:
        message: one line, no trailing period, values in backticks.
        hint: what to do about it, or None.
        exit_code: the exit code of the command line (docs/cli.md).
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(MoeccError):
    """The recipe is wrong; `message` lists every mistake with file, line and column."""


class SourceError(MoeccError):
    """A source checkpoint cannot be found, read or trusted, or does not fit the others."""


class PlanError(MoeccError):
    """No plan fits the recipe: the budget, or a plan file made for other sources."""


class ArtifactError(MoeccError):
    """An artifact or output folder cannot be written, opened or understood."""


class DamagedArtifactError(ArtifactError):
    """An artifact does not hold the bytes its manifest promises."""

    exit_code = 3


class RequestError(MoeccError):
    """A request asks for what cannot be; `param` names the field, `code` is OpenAI's, if any."""

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.param = param
        self.code = code


class BusyError(MoeccError):
    """The queue is full; `retry_after` seconds may help."""

    retry_after = 1


class StoppedError(MoeccError):
    """The engine takes no more requests: it is stopping, or it has died."""


class RuntimeUnfitError(MoeccError):
    """The artifact cannot be served as asked: device, memory, mode or family."""
