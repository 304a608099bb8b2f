"""Run with a Python that has the ``openai`` package: ``openai_audio_client.py URL KEY WAV TEXT``.

Prints, as JSON, what the package's own functions make of speech and transcriptions.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

import openai


def main() -> None:
    url, key, wav, text = sys.argv[1:]
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    found: dict[str, Any] = {"models": [model.id for model in client.models.list()]}
    asked: dict[str, Any] = {"model": "tiny", "voice": "default", "input": text}
    with client.audio.speech.with_streaming_response.create(**asked, response_format="pcm") as response:
        parts = list(response.iter_bytes(640))
    found["pcm"] = base64.b64encode(b"".join(parts)).decode()
    for form in ("wav", "mp3", "flac", "opus"):
        found[form] = base64.b64encode(client.audio.speech.create(**asked, response_format=form).content).decode()
    with client.audio.speech.with_streaming_response.create(
        **asked, response_format="pcm", stream_format="sse"
    ) as response:
        sent = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    found["sse"] = [event["type"] for event in sent]
    found["sse_pcm"] = base64.b64encode(
        b"".join(base64.b64decode(event["audio"]) for event in sent if "audio" in event)
    ).decode()
    for wrong in ({"voice": "alloy"}, {"input": " "}, {"speed": 2.0}, {"response_format": "aac"}):
        try:
            client.audio.speech.create(**{**asked, **wrong})
        except openai.BadRequestError as error:
            found[f"wrong {next(iter(wrong))}"] = [error.param, error.body["message"]]  # type: ignore[index,call-overload]
    with open(wav, "rb") as file:
        sound = file.read()
    given: dict[str, Any] = {"model": "tiny", "file": ("talk.wav", sound)}
    found["json"] = client.audio.transcriptions.create(**given).text
    for form in ("text", "srt", "vtt"):
        found[form] = client.audio.transcriptions.create(**given, response_format=form)
    verbose = client.audio.transcriptions.create(
        **given, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    found["words"] = [[word.word, word.start, word.end] for word in verbose.words]
    found["segments"] = [segment.text for segment in verbose.segments]
    found["events"] = [
        [event.type, event.model_extra] for event in client.audio.transcriptions.create(**given, stream=True)
    ]
    stream = client.audio.transcriptions.create(**given, stream=True)
    found["deltas"] = [getattr(event, "delta", None) or event.text for event in stream]
    for name, file in (("not sound", b"nothing"), ("nothing", b"")):
        try:
            client.audio.transcriptions.create(model="tiny", file=("talk.wav", file))
        except openai.BadRequestError as error:
            found[name] = error.body["message"]  # type: ignore[index,call-overload]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
