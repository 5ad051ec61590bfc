"""A request as the engine loop knows it, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.channel.messages import FailedCode, Finish, RefusedCode, Sampling, Stop, TokenLogprobs
from worker.chat.protocol import Thinking
from worker.engine.constrain import Compiled


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """A rendered and tokenized request.  Identity is its key."""

    client: str  # opaque; see `shared.channel.messages.Generate`
    tokens: list[int]  # at least one, and fewer than the context has
    choices: int = 1
    max_tokens: int | None = None  # 0: the prompt is processed, and the answers are empty
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # texts with which the model's template ends an answer
    logprobs: int | None = None
    scores_prompt: bool = False  # with `logprobs`: answers begin with the log probabilities of the prompt
    reports_end: bool = False  # with `logprobs`: also that of the token that ends an answer
    is_accepted: bool = False  # a part of a request that has begun: it is not refused for its wait
    constraint: Compiled | None = None  # on the text of each answer
    thinking: Thinking | None = None  # where the answers reason, if that is limited
    thinking_tokens: int = 0  # of the reasoning of each answer, at most
    reports_progress: bool = False  # while the prompt is processed
    shown: frozenset[int] = frozenset()  # control tokens whose text is part of the answer
    arrived_at: float  # by the monotonic clock
    deadline: float  # by the monotonic clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The job waits for its start."""

    job: Job
    ahead: int  # number of jobs before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """The job has a sequence for each of its answers."""

    job: Job
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The prompt of the job is processed in part."""

    job: Job
    tokens: int  # of the prompt, that are processed


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step adds to one answer.  `finish` and `stop` are set in the answer's last piece."""

    job: Job
    choice: int
    text: str
    n_tokens: int  # generated in this step, which may have no text yet
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None
    stop: Stop | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """All answers of the job have finished.  Times are in seconds."""

    job: Job
    cached_tokens: int
    generated_tokens: int
    wait_s: float
    prompt_s: float
    generation_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The job was not begun: it is invalid, the queue was full, or it waited for too long."""

    job: Job
    code: RefusedCode
    message: str
    param: str | None = None  # the field that is at fault, by OpenAI's name
    retry_after_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """The job was begun and did not complete."""

    job: Job
    code: FailedCode
    message: str


Outcome = Waiting | Begun | Reading | Piece | Done | Rejected | Broken
