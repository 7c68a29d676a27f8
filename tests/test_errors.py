"""ERRORS: every error is one sentence with its remedy, and has what HTTP and OpenAI's envelope need."""

from __future__ import annotations

import dataclasses
from http import HTTPStatus

import pytest

from localaid import (
    AdapterMissing,
    BadRequest,
    BodyTooLarge,
    BodyTooSlow,
    BrokenFrame,
    CannotListen,
    CannotPublish,
    ChannelDowngraded,
    ChannelInvalid,
    ChannelNotKept,
    ChannelTooLarge,
    ChannelUnreachable,
    ContextLengthExceeded,
    DaemonRefused,
    DaemonUnreachable,
    DemoModelMissing,
    EncodingUnsupported,
    EngineFailed,
    FolderUnusable,
    GrammarInvalid,
    InfillUnsupported,
    InputTooLong,
    InternalFault,
    KeyConfined,
    KeyFileUnusable,
    KeyNotTaken,
    KeyRefused,
    LocalaidError,
    MethodNotAllowed,
    ModelFailed,
    ModelTooLarge,
    NoChannels,
    NoModelsFolder,
    NoRoom,
    NothingToPull,
    OpenWithoutKeys,
    OriginRefused,
    PreviousResponseNotFound,
    PromptEmpty,
    PullFailed,
    PullOff,
    QueueFull,
    ResponseNotFound,
    RouteNotFound,
    SchemaUnsupported,
    ShuttingDown,
    SignatureWrong,
    SocketUnusable,
    SourceFailed,
    StillDownloading,
    StillHashing,
    TokenUnknown,
    UpdateBusy,
    UpdateFailed,
    WeightsMismatch,
    WorkerDied,
    error_from_wire,
    error_to_wire,
)

NOT_KEPT = (
    "Response 'resp_1' is not kept here: it was not stored, was deleted, was unused for too long, "
    "is another client's, or localaid was restarted; send its items as `input`."
)


def all_errors() -> list[type[LocalaidError]]:
    """Return every class of the tree."""
    found, left = [], [LocalaidError]
    while left:
        one = left.pop()
        found.append(one)
        left += one.__subclasses__()
    return found


@pytest.mark.parametrize(
    ("error", "status", "code", "sentence"),
    [
        (
            ContextLengthExceeded(prompt_tokens=9000, ctx_size=8192),
            400,
            "context_length_exceeded",
            (
                "This model's maximum context length is 8192 tokens, but the prompt has 9000 tokens; shorten it, or "
                "raise ctx_size in the rule."
            ),
        ),
        (
            InputTooLong(param="input", place=3, tokens=700, ctx_size=512),
            400,
            "context_length_exceeded",
            "This model takes 512 tokens at once, but item 3 of `input` has 700; cut it into parts.",
        ),
        (PromptEmpty(), 400, "prompt_empty", "The prompt has no tokens; send at least one character."),
        (
            TokenUnknown(token=70000, vocab_tokens=49152),
            400,
            "token_unknown",
            "Token 70000 is not one of this model's 49152 tokens; send ids from 0 up.",
        ),
        (
            SchemaUnsupported(where="properties.a", problem="uses `not`, which no grammar can enforce"),
            400,
            "unsupported_schema",
            "The JSON schema in `response_format` at properties.a uses `not`, which no grammar can enforce.",
        ),
        (
            GrammarInvalid(problem="expected ::= behind the name of a rule", line=2),
            400,
            "invalid_grammar",
            "`grammar`, line 2: expected ::= behind the name of a rule.",
        ),
        (
            InfillUnsupported(),
            400,
            "infill_unsupported",
            (
                "This model has no tokens for filling in the middle of a text; leave `suffix` out, or ask a model that "
                "was trained for it."
            ),
        ),
        (BadRequest(param="n", problem="must be at least 1"), 400, "invalid_value", "`n` must be at least 1."),
        (
            BadRequest(param=None, problem="is empty"),
            400,
            "invalid_value",
            "The request body is empty; send one JSON object in UTF-8.",
        ),
        (
            QueueFull(file="a.gguf", waiting=64, retry_after_s=2.5),
            429,
            "rate_limit_exceeded",
            "64 requests already wait for a.gguf; ask again in 3 s, or raise `queue_size` in the settings.",
        ),
        (
            ResponseNotFound(response_id="resp_1"),
            404,
            "response_not_found",
            NOT_KEPT,
        ),
        (
            PreviousResponseNotFound(response_id="resp_1"),
            404,
            "previous_response_not_found",
            NOT_KEPT,
        ),
        (
            RouteNotFound("GET", "/v2"),
            404,
            "unknown_url",
            "GET /v2 is not served here; the README lists every path, most begin with /v1/.",
        ),
        (
            MethodNotAllowed("GET", "/v1/chat/completions", ["POST"]),
            405,
            "method_not_allowed",
            "/v1/chat/completions takes POST, not GET.",
        ),
        (
            BodyTooLarge(limit_bytes=10),
            413,
            "request_too_large",
            (
                "The request body, unpacked, is larger than 10 bytes; send a smaller one, or raise `body_limit` in the "
                "settings."
            ),
        ),
        (
            BodyTooSlow(limit_s=120.0),
            408,
            "request_timeout",
            "The request body was not complete after 120 s; send it faster, or raise `body_timeout` in the settings.",
        ),
        (
            EncodingUnsupported(encoding="br"),
            415,
            "unsupported_encoding",
            "Content-Encoding 'br' is not taken; send the body plain, as gzip or as deflate.",
        ),
        (
            KeyRefused(is_missing=True),
            401,
            "invalid_api_key",
            "No API key was sent; send one as `Authorization: Bearer KEY`, or in header x-api-key or api-key.",
        ),
        (
            KeyRefused(is_missing=False),
            401,
            "invalid_api_key",
            "The API key that was sent is not known here; check it against `api_keys` in the settings of localaid.",
        ),
        (
            KeyConfined(key="bob", path="/metrics"),
            403,
            "key_confined",
            (
                "The API key 'bob' is confined to some models, and /metrics tells of all; ask with a key that has "
                "neither `model` nor `names`."
            ),
        ),
        (
            KeyNotTaken(listen="127.0.0.1:8080"),
            500,
            None,
            (
                "the daemon on 127.0.0.1:8080 wants an API key that is not confined to some models; give it as "
                "$LOCALAID_API_KEY or with --api-key."
            ),
        ),
        (
            SocketUnusable(name="web", problem="has an unknown name"),
            500,
            None,
            (
                "cannot use the socket 'web' that systemd has passed: it has an unknown name; give its .socket unit "
                "ListenStream= and FileDescriptorName=http, or control."
            ),
        ),
        (
            FolderUnusable(folder="/m", problem="finds no such folder", user="localaid", fix="make it"),
            500,
            None,
            "/m: user localaid finds no such folder; make it",
        ),
        (
            OpenWithoutKeys(where="0.0.0.0:80"),
            500,
            None,
            (
                "will not listen on 0.0.0.0:80, which others can reach, without API keys; give `api_keys` in the "
                "settings (or the systemd credential api-keys), listen on 127.0.0.1, or set allow_without_keys: true."
            ),
        ),
        (
            StillHashing(name="x", files=["a.gguf"]),
            503,
            "model_hashing",
            "The model 'x' may be a.gguf, still being hashed; ask again in a while.",
        ),
        (
            AdapterMissing(rule="r", sha="sha256:ab"),
            503,
            "adapter_missing",
            "Rule 'r' needs the LoRA adapter sha256:ab, which is not there; put it into a models folder.",
        ),
        (
            OriginRefused(origin="https://example.org"),
            403,
            "origin_refused",
            (
                "Web pages of 'https://example.org' may not do this; list them under `cors_origins` in the settings if "
                "they should."
            ),
        ),
        (
            NothingToPull(name="x", reason="no config has it"),
            404,
            "nothing_to_pull",
            "'x' cannot be fetched: no config has it.",
        ),
        (
            PullOff(),
            409,
            "pull_off",
            "localaid fetches no weights here; set `pull: manual`, or on-demand, in the settings.",
        ),
        (
            PullFailed(file="a.gguf", problem="https://example.org/a answers with status 404", retry_after_s=60.0),
            503,
            "pull_failed",
            "a.gguf could not be downloaded: https://example.org/a answers with status 404.",
        ),
        (
            SourceFailed(url="https://example.org/a", problem="answers with status 404"),
            503,
            "pull_failed",
            "https://example.org/a answers with status 404",
        ),
        (
            WeightsMismatch(url="https://example.org/a", wanted="sha256:ab", found="sha256:cd", kept="/m/a.mis"),
            503,
            "pull_failed",
            (
                "https://example.org/a gave sha256:cd where sha256:ab was wanted; it is kept as /m/a.mis and not "
                "served: correct the rule if this is the file that you want, or else delete it"
            ),
        ),
        (
            NoRoom(folder="/m", needed_bytes=3 << 20, free_bytes=-1),
            503,
            "pull_failed",
            (
                "/m needs 3 MiB of free space and has 0 MiB; make room, or add a models folder on another disk, and "
                "pull again"
            ),
        ),
        (
            NoModelsFolder(problems=["/m: Read-only file system"]),
            503,
            "pull_failed",
            (
                "no models folder can be written (/m: Read-only file system); let localaid write to one, or add one "
                "with --models"
            ),
        ),
        (
            StillDownloading(name="x", progress="a.gguf: 41 % of 98 MB", retry_after_s=2.1),
            503,
            "model_downloading",
            (
                "The model 'x' is being downloaded (a.gguf: 41 % of 98 MB); ask again in 3 s, or ask for a stream, "
                "which waits."
            ),
        ),
        (ShuttingDown(), 503, "shutting_down", "localaid is shutting down; ask again when it has been restarted."),
        (
            WorkerDied(file="a.gguf", reason="was ended by SIGSEGV"),
            500,
            "worker_died",
            "The worker of a.gguf was ended by SIGSEGV; ask again, the next request starts a new one.",
        ),
        (
            EngineFailed(file="a.gguf", reason="no tensors"),
            500,
            None,
            "a.gguf: llama.cpp: no tensors; check the file (localaid hash) and the rule's load options.",
        ),
        (
            BrokenFrame(problem="nonsense"),
            500,
            None,
            "Daemon and worker do not understand each other (nonsense); restart localaid after an upgrade.",
        ),
        (
            UpdateFailed("main", "ValueError: x"),
            503,
            "update_failed",
            "channel main: ValueError: x; what is in force stays, `localaid update` tries again.",
        ),
        (
            ChannelUnreachable("main", "https://x/ answers with status 500", retry_after_s=9.0),
            503,
            "update_failed",
            (
                "channel main: https://x/ answers with status 500; what is in force stays, and localaid asks again by "
                "itself: if that does not help, check the network, the proxy, and `updates` in the settings."
            ),
        ),
        (
            ChannelTooLarge("main", "a.yaml has 9 bytes, and may have 8"),
            503,
            "update_failed",
            (
                "channel main: a.yaml has 9 bytes, and may have 8; what is in force stays, its owner has to make it "
                "smaller."
            ),
        ),
        (
            SignatureWrong("main", "index.json: its signature does not hold for key 01"),
            503,
            "update_failed",
            (
                "channel main: index.json: its signature does not hold for key 01; what is in force stays, and nothing "
                "of this is used: unless it was just being published, compare `public_key` in the settings with what "
                "the channel's owner says."
            ),
        ),
        (
            ChannelDowngraded("main", "its serial is 1, after 2"),
            503,
            "update_failed",
            (
                "channel main: its serial is 1, after 2; what is in force stays: somebody may be holding updates back, "
                "or else the channel's owner has to publish with a higher --serial."
            ),
        ),
        (
            ChannelInvalid("main", "a.yaml: top_q: unknown key"),
            503,
            "update_failed",
            "channel main: a.yaml: top_q: unknown key; what is in force stays, its owner has to correct that.",
        ),
        (
            ChannelNotKept("main", "/s: No space left on device"),
            503,
            "update_failed",
            (
                "channel main: /s: No space left on device; what is in force stays: see that localaid may write to its "
                "state folder and that the disk has room."
            ),
        ),
        (
            UpdateBusy(file="/s/update.lock"),
            409,
            "update_busy",
            "another localaid is updating (it holds /s/update.lock); ask again when it is done.",
        ),
        (
            NoChannels(),
            409,
            "no_channels",
            "no channel is configured; give `updates` a `url` and a `public_key` in the settings.",
        ),
        (KeyFileUnusable("/k", "the password is wrong"), 500, None, "/k: the password is wrong."),
        (
            CannotPublish("/c", "there is no config in it"),
            500,
            None,
            "/c is not published: there is no config in it.",
        ),
        (
            InternalFault(request_id="req-1"),
            500,
            None,
            "localaid failed at this request; look for req-1 in its log and report it.",
        ),
        (
            CannotListen(where="[::1]:80", problem="Permission denied"),
            500,
            None,
            "cannot listen on [::1]:80: Permission denied; choose another address with --listen or in the settings.",
        ),
        (
            DaemonUnreachable(tried=["127.0.0.1:8080 (Connection refused)"]),
            500,
            None,
            "no daemon answers on 127.0.0.1:8080 (Connection refused); start it, or name it with --listen.",
        ),
        (
            DaemonUnreachable(tried=["unix:/a (Permission denied)", "[::1]:1 (refused)"], join="usermod -aG x ann"),
            500,
            None,
            (
                "no daemon answers on unix:/a (Permission denied), nor on [::1]:1 (refused); start it, or name it with "
                "--listen, or join the group that may ask there: usermod -aG x ann, then log in again."
            ),
        ),
        (
            DaemonRefused(listen="127.0.0.1:8080", problem="There is no GET /x; see /openapi.json."),
            500,
            None,
            "the daemon on 127.0.0.1:8080 says: There is no GET /x; see /openapi.json.",
        ),
        (
            DemoModelMissing(),
            500,
            None,
            "the demo's model is not installed; install it with: pip install 'localaid[demo]'",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LocalaidError) else "",
)
def test_the_text_of_an_error(error: LocalaidError, status: int, code: str | None, sentence: str) -> None:
    """One sentence, one status, one code each."""
    assert (str(error), error.status, error.code) == (sentence, status, code)


def test_every_error_has_a_status_and_a_type() -> None:
    """All derive from one base and say what they are."""
    assert len(all_errors()) > 25
    for error in all_errors():
        assert HTTPStatus(error.status) >= HTTPStatus.BAD_REQUEST
        assert error.type
        assert error.__doc__


def test_the_numbers_of_a_model_that_can_never_fit_are_told() -> None:
    """Both of them, so that an administrator can decide."""
    names = {field.name for field in dataclasses.fields(ModelTooLarge)}
    assert names >= {"file", "needed_bytes", "budget_bytes"}
    assert ModelTooLarge.status == HTTPStatus.SERVICE_UNAVAILABLE
    assert ModelFailed.status == HTTPStatus.SERVICE_UNAVAILABLE


@pytest.mark.parametrize(
    "error",
    [PromptEmpty(), ContextLengthExceeded(prompt_tokens=3, ctx_size=2), TokenUnknown(token=1, vocab_tokens=1)],
    ids=lambda error: type(error).__name__,
)
def test_an_error_crosses_the_wire_as_itself(error: LocalaidError) -> None:
    """Class and fields survive; what the other side does not know is still told."""
    name, fields = error_to_wire(error)
    again = error_from_wire(name, fields)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert "NoSuchError" in str(error_from_wire("NoSuchError", {}))


def test_a_reason_that_is_a_sentence_ends_none_within_another() -> None:
    """Its full stop goes."""
    assert "cannot be run (it is broken); localaid" in str(ModelFailed("a.gguf", "it is broken.", 3.0))
