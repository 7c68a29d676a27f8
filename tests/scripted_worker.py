"""A worker without a model, for fault tests: it speaks section 10's frames and does what the prompts say.

The "model file" is a text: `ok`, `refuse`, `crash` or `stuck` say how the load goes; `large`: it takes 1 GB;
`stubborn`: it ignores Stop and SIGTERM.  A prompt's text is a command with arguments:

- `say N`: N deltas, one a step, then the end; the text of each is its number and a space
- `hold`: accepted and one delta; the end comes when a `release` arrives
- `silent`: nothing at all until a `release` arrives
- `release`: lets all held ones end, oldest first, then itself
- `log`: one delta with the commands received so far, by `|`
- `die`, `abort`, `exit`, `garbage`: at once, before any answer
- `start-and-die`: after a first delta
- `die-once FILE`: as `die` if FILE exists, which it removes; else as `say 1`
- `reject`: `Rejected` with an error of section 9

Tasks with one reply take the same commands: `say N` is answered with N tokens, `hold` and `silent` when a `release`
arrives; a Tokenize's text, a Rerank's query and an Embed's first input are commands.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Literal

import localaid
from localaid import Accepted, Delta, FromWorker, Rejected, Step, Submit, encode_frame


class ScriptedWorker:
    """Answers frames as its prompts say."""

    def __init__(self, connection: socket.socket) -> None:
        """Serve the daemon at the other end of `connection`."""
        self.connection = connection
        self.held: list[localaid.Task] = []
        self.log: list[str] = []
        self.stubborn = False

    def send(self, *messages: FromWorker) -> None:
        """Send frames."""
        self.connection.sendall(b"".join(encode_frame(message) for message in messages))

    def run(self) -> int:
        """Serve until told to stop."""
        reader = localaid.FrameReader(localaid.TO_WORKER)
        while chunk := self.connection.recv(1 << 16):
            for message in reader.feed(chunk):
                self.take(message)
        return 0

    def take(self, message: localaid.ToWorker) -> None:
        """Do what a message says."""
        match message:
            case localaid.LoadModel():
                self.load(message)
            case Submit():
                self.answer(message)
            case localaid.Tokenize(parts=[str(text)]) | localaid.Rerank(query=text):
                self.reply(message, text)
            case localaid.Embed(inputs=[str(text), *_]):
                self.reply(message, text)
            case localaid.Cancel(id=request):
                self.log.append("cancelled")
                self.held = [submit for submit in self.held if submit.id != request]
            case localaid.Stop():
                if not self.stubborn:
                    self.release("stopped")
                    sys.exit(0)

    def load(self, message: localaid.LoadModel) -> None:
        """Load as the file says."""
        words = Path(message.path).read_text(encoding="utf-8").split()
        self.stubborn = "stubborn" in words
        if self.stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.send(localaid.Loading(progress=0.5))
        if "refuse" in words:
            self.send(localaid.LoadFailed(reason="unknown architecture"))
            sys.exit(1)
        if "crash" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        while "stuck" in words:
            time.sleep(3600)
        parallel = message.options.parallel or 4
        rss_bytes = 10**9 if "large" in words else 10**6
        self.send(localaid.Loaded(ctx_size=512, parallel=parallel, vocab_tokens=100, rss_bytes=rss_bytes))

    def release(self, text: str) -> None:
        """End all that are held."""
        for held in self.held:
            self.finish(held, text)
        self.held = []

    def reply(self, task: localaid.Task, text: str) -> None:
        """Do what a task's text says."""
        command, *arguments = text.split()
        self.log.append(text)
        match command:
            case "say":
                self.send(reply_to(task, int(arguments[0])))
            case "hold" | "silent":
                self.held.append(task)
            case "release":
                self.release("released")
                self.send(reply_to(task, 0))
            case "die-once" if not Path(arguments[0]).exists():
                self.send(reply_to(task, 1))
            case "die-once":
                Path(arguments[0]).unlink()
                self.end("die")
            case "reject":
                self.send(Rejected(id=task.id, error="ModelRemoved", fields={"file": "some.gguf"}))
            case _:
                self.end(command)

    def finish(self, submit: localaid.Task, text: str = "") -> None:
        """End every sequence of a request."""
        if not isinstance(submit, Submit):
            self.send(reply_to(submit, 0))
            return
        self.send(Step(deltas=[Delta(submit.id, index, text, 1, "stop") for index in range(submit.n)]))

    def answer(self, submit: Submit) -> None:
        """Do what the prompt says."""
        text = submit.prompt.text if isinstance(submit.prompt, localaid.TextPrompt) else "no text"
        command, *arguments = text.split()
        self.log.append(text)
        accepted = [Accepted(submit.id, 7, 3)]
        match command:
            case "say":
                self.say(submit, int(arguments[0]))
            case "hold":
                self.send(Step(accepted=accepted, deltas=[Delta(submit.id, 0, "held ", 1)]))
                self.held.append(submit)
            case "silent":
                self.held.append(submit)
            case "release":
                self.release("released")
                self.finish(submit)
            case "log":
                self.finish(submit, "|".join(self.log))
            case "start-and-die":
                self.send(Step(accepted=accepted, deltas=[Delta(submit.id, 0, "first ", 1)]))
                self.end("die")
            case "die-once" if Path(arguments[0]).exists():
                Path(arguments[0]).unlink()
                self.end("die")
            case "die-once":
                self.say(submit, 1)
            case "reject":
                self.send(Rejected(id=submit.id, error="ModelRemoved", fields={"file": "some.gguf"}))
            case _:
                self.end(command)

    def say(self, submit: Submit, steps: int) -> None:
        """Answer in so many steps."""
        self.send(Step(accepted=[Accepted(submit.id, 7, 3)]))
        for step in range(steps):
            finish: Literal["stop"] | None = "stop" if step == steps - 1 else None
            self.send(Step(deltas=[Delta(submit.id, index, f"{step} ", step + 1, finish) for index in range(submit.n)]))

    def end(self, how: str) -> None:
        """End in a bad way."""
        match how:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "abort":
                os.abort()
            case "exit":
                sys.exit(3)
            case "garbage":
                self.connection.sendall(b"\xff" * 64)
            case _:
                sys.exit(f"unknown command {how}")


def reply_to(task: localaid.Task, tokens: int) -> localaid.Reply:
    """Return a reply of the kind that is due."""
    match task:
        case localaid.Rerank():
            return localaid.Ranked(id=task.id, scores=[0.5] * tokens, tokens=tokens)
        case localaid.Embed():
            return localaid.Embedded(id=task.id, vectors=[b"\0\0\0\0"] * tokens, tokens=tokens)
    return localaid.Tokenized(id=task.id, tokens=list(range(tokens)), pieces=[b"a"] * tokens)


def main() -> int:
    """Serve on `--fd N`."""
    with socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1])) as connection:
        return ScriptedWorker(connection).run()


if __name__ == "__main__":
    sys.exit(main())
