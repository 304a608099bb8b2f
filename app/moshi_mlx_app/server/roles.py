"""Role and voice that a connection asks for: ``text_prompt`` and ``voice_prompt``, as NVIDIA's clients name them.

Checked before the upgrade to a WebSocket. A query names voices that come with the model, or the server's own default;
it never names a path.
"""

from __future__ import annotations

from collections.abc import Mapping

from moshi_mlx.engine.pipeline import Opening
from moshi_mlx.errors import MoshiError
from moshi_mlx.tasks.dialogue import Moshi

from .settings import BadQuery

__all__ = ["Roles", "ends_turns_by_gaps"]

_LONGEST = 4000  # letters of a role in a query


class Roles:
    """Prompts of the conversations on one model.

    Parameters
    ----------
    model : Moshi
    role, voice, pin
        The server's own, as for :meth:`Moshi.opening`: for what a query does not say.

    Raises
    ------
    MoshiError
        If the model does not take them.
    """

    def __init__(self, model: Moshi, role: str | None = None, voice: str | None = None, pin: bool = True):
        self._model, self._role, self._voice, self._pin = model, role, voice, pin
        self.voices = model.voices()
        self._default = model.opening(role, voice, pin=pin)

    def about(self) -> dict[str, object] | None:
        """What the page shows: the default role and the voices; None where the model takes no role."""
        if not self._model.takes_role:
            return None
        role = self._model.default_role if self._role is None else self._role
        return {"role": role, "voices": self.voices, "longest": _LONGEST}

    def opening(self, query: Mapping[str, str]) -> Opening | None:
        """The prompts that a query asks for. Reads files.

        Raises
        ------
        BadQuery
            If there is no such voice, the role is too long, or the model takes none.
        """
        role, voice = query.get("text_prompt"), query.get("voice_prompt")
        if not self._model.takes_role and not role and not voice:
            return None
        if role is None and voice is None:
            return self._default
        if role is not None and len(role) > _LONGEST:
            raise BadQuery(f"text_prompt: a role has {_LONGEST} letters at most, found {len(role)}")
        if voice and self._model.takes_role and voice.removesuffix(".pt") not in self.voices:
            known = ", ".join(self.voices) or "none but the server's own: leave voice_prompt out"
            raise BadQuery(f"voice_prompt: there is no voice {voice[:60]!r} here; there are {known}")
        try:
            return self._model.opening(
                self._role if role is None else role, self._voice if voice is None else voice, pin=self._pin
            )
        except MoshiError as error:
            raise BadQuery(str(error)) from None


def ends_turns_by_gaps(query: Mapping[str, str], agent: str) -> bool:
    """Whether a client takes half a second without sound for the end of a turn, and so wants none of silence.

    ``gaps=1`` asks for it, ``gaps=0`` for sound without end. Where neither is said: a program (no browser) that names a
    voice and nothing about sampling, as the client of livekit-plugins-nvidia does, which cannot be told to say more.
    """
    if "gaps" in query:
        return query["gaps"] not in ("", "0")
    sampling = any(name.endswith(("temperature", "topk")) for name in query)
    return "voice_prompt" in query and not sampling and not agent.startswith("Mozilla")
