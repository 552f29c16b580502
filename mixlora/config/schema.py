"""The typed trunk of the configuration: what every YAML under configs/ must fit into.

Plain dataclasses, no torch: a typing error on the command line costs a fraction of a second. Options that belong to one
gate or one loss are typed beside that gate or loss (`gates.py`, `losses.py`) and reach it through the mappings below.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


@dataclass(kw_only=True)
class FeedForwardNames:
    """How a model family names the parts of its feed-forward block."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"


class Dtype(Enum):
    auto = "auto"  # bfloat16 on an accelerator, float32 on a CPU
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Quantization(Enum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


@dataclass(kw_only=True)
class Model:
    """Which base model; one origin: `path` (hub id or folder), `package` with `gguf_file`, or `random` (a config)."""

    name: str = MISSING
    path: str | None = None
    revision: str | None = None
    package: str | None = None
    gguf_file: str | None = None
    random: dict[str, Any] | None = None
    dtype: Dtype = Dtype.auto
    quantization: Quantization = Quantization.none
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    attention: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    feed_forward: FeedForwardNames = field(default_factory=FeedForwardNames)


class Scope(Enum):
    linear = "linear"  # a gate beside each adapted linear
    feed_forward = "feed_forward"  # one gate for each feed-forward block


class Factors(Enum):
    own = "own"  # every expert has its own A and B
    shared_a = "shared_a"  # one A for all experts


class Scale(Enum):
    alpha_over_r = "alpha_over_r"  # LoRA
    alpha_over_sqrt_r = "alpha_over_sqrt_r"  # rsLoRA
    alpha_over_k = "alpha_over_k"  # with gates that sum to k
    constant = "constant"  # alpha itself


class Compute(Enum):
    fast = "fast"  # hand-written backward, wherever the base layer allows it; lean from where memory runs out
    lean = "lean"  # the same; a feed-forward mixture keeps half the bytes and computes its hidden rows twice
    eager = "eager"  # autograd over the plain equation: for torch.compile, and to compare


@dataclass(kw_only=True)
class Method:
    """y = W x + s B (g(x) * A x): which linears, how many blocks, what rank, which gate."""

    name: str = MISSING
    scope: Scope = Scope.linear
    # "all-linear", "attention", "feed-forward", a list of name endings, or one regular expression over full names
    target_modules: Any = "all-linear"
    # with scope=feed_forward: linears that carry one ordinary LoRA beside the mixture
    plain_modules: Any = None
    r: Any = 8  # rank of one expert: a number, or a pattern that is stretched over the layers
    num_experts: Any = 1
    top_k: Any = None
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    scale: Scale = Scale.alpha_over_r
    factors: Factors = Factors.own
    gate: dict[str, Any] | None = None  # {kind: ..., options of that kind}; none for plain LoRA
    adapter_dtype: Dtype = Dtype.float32
    compute: Compute = Compute.fast


@dataclass(kw_only=True)
class Splits:
    """Which split of the set plays which part. For a user's own file: a file's name, or a slice "[:90%]" of rows."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None  # the split that a result is reported on


@dataclass(kw_only=True)
class Options:
    """Where a row keeps its answer options; exactly one of field, columns, fixed."""

    field: str | None = None  # a column that holds a list of texts or a mapping label -> text; dotted paths work
    labels: str | None = None  # a column with one label an option, as the answer names them
    columns: list[str] | None = None  # one column an option
    fixed: list[str] | None = None  # the same texts for every row


@dataclass(kw_only=True)
class Replacement:
    """What stands in the place of each match of a regular expression."""

    pattern: str = MISSING
    by: str = ""


@dataclass(kw_only=True)
class Wording:
    """How a named protocol words an option task: question, then the options if it lists them, then `end`."""

    question: str | None = None  # a template over the row's columns; None: the task's own
    clean: list[Replacement] = field(default_factory=list)  # in the question and in each option, one after the other
    option: str | None = None  # how one option is listed, over {number}, {label} and {text}; None: none is
    between: str = ""  # between two listed options
    end: str = ""  # "{labels}" stands for all of them, with "/" between
    cue: str = ""
    labels: list[str] | None = None  # what the options are called, in order; None: their labels in the row
    known: list[str] | None = None  # labels that an answer is sought among; None: those of the row's options
    blank: str | None = None  # partial scoring: an option fills this blank, what follows the blank is scored
    harness_task: str | None = None  # eval.backend=lm_eval: what lm-evaluation-harness calls this task


class Answer(Enum):
    options = "options"  # pick one option
    text = "text"  # generate a short text, compare folded
    number = "number"  # generate reasoning that ends in a number
    code = "code"  # generate a function, run its tests


@dataclass(kw_only=True)
class Task:
    """One data set, how a row becomes a question with an answer, and how an answer is scored."""

    name: str = MISSING
    path: str = MISSING  # a hub id, or a user's own .jsonl, .csv or .parquet file, or a folder of them
    config: str = "default"
    splits: Splits = field(default_factory=Splits)
    identity: str | None = None  # a template: rows with the same text are the same; None: question and options
    group: str | None = None  # a template: rows with the same lines of it, in any order, are held out together
    where: dict[str, Any] | None = None  # keep only the rows with these values: {image: null}
    question: str = MISSING  # a template over the row's columns: "{context} {question}"
    cue: str = "\nAnswer:"  # with the plain template: what follows the question
    options: Options | None = None
    repeated_options: bool = False  # the set is known to have rows with two equal options; keep them
    answer: str = MISSING  # the column with the answer (a label, an index, or the text to generate)
    answer_values: list[Any] | None = None  # the value of `answer` that names each option, in order
    answer_contains: str | None = None  # a text that every right answer has: "####" in GSM8K
    answer_kind: Answer = Answer.options
    metric: str = "acc_norm"
    tests: str | None = None  # answer_kind=code: template of the test program
    entry_point: str | None = None  # answer_kind=code: column with the name of the function
    prefix: str | None = None  # answer_kind=code: template of the code that an answer may go on from; it runs before it
    fixtures: str | None = None  # answer_kind=code: template of code that runs after the answer
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int = 64
    wordings: dict[str, Wording] = field(default_factory=dict)  # data.style -> how that protocol words this task
    # in a mixture
    weight: float = 1.0
    cap: int | None = None  # use at most so many training rows
    eval_only: bool = False
    train_only: bool = False


class Sampling(Enum):
    proportional = "proportional"
    equal = "equal"
    temperature = "temperature"


@dataclass(kw_only=True)
class Mixture:
    name: str = MISSING
    mixture: dict[str, Task] = field(default_factory=dict)
    sampling: Sampling = Sampling.proportional
    temperature: float = 2.0  # p ~ size ** (1 / temperature), with sampling=temperature
    size_cap: int | None = None  # T5-style: no task counts as larger than this


class BadRow(Enum):
    error = "error"
    skip = "skip"


class Loss(Enum):
    answer = "answer"  # the answer and its terminator
    all = "all"  # the prompt as well


class Template(Enum):
    auto = "auto"  # the model's chat template when it has one
    chat = "chat"
    plain = "plain"


class Style(Enum):
    cloze = "cloze"  # the question alone; the answer is the text of an option
    letters = "letters"  # the options are listed as A. B. ...; the answer is a letter
    # the wordings of published protocols, from the task's `wordings`; never with a chat template
    llm_adapters = "llm_adapters"
    moe_peft = "moe_peft"
    lm_eval = "lm_eval"


class Overlap(Enum):
    note = "note"  # say how many scored rows are also trained on
    drop = "drop"  # leave those rows out of training
    error = "error"  # stop before anything is trained


@dataclass(kw_only=True)
class Data:
    source: str = "hub"  # hub | sample | a folder laid out like the hub
    on_bad_row: BadRow = BadRow.error
    overlap: Overlap = Overlap.error
    template: Template = Template.auto
    style: Style = Style.cloze
    loss_on: Loss = Loss.answer


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass(kw_only=True)
class Train:
    max_steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 5e-4
    lr_scheduler: Schedule = Schedule.cosine
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 2
    micro_batch_size: int | None = None  # rows of a forward, fewer than those of a device; a step has the same rows
    max_length: int = 512
    packing: bool = True  # rows of a micro-batch in one line without padding, each seeing itself alone
    max_tokens: int | None = (
        None  # with packing: as few micro-batches as keep within this, instead of so many rows each
    )
    torch_compile: bool = False  # decoder layers of training steps through torch.compile
    logging_steps: int = 1
    save_steps: int = 50
    save_total_limit: int = 2
    eval_steps: int | None = None  # evaluate every so many steps on the validation split, limited to eval_limit
    eval_limit: int = 50
    load_best: bool = False  # keep the checkpoint with the best mean validation score


class Protocol(Enum):
    auto = "auto"  # as the model was trained: the one that data.style belongs to
    loglikelihood = "loglikelihood"  # the text of each option, scored after the question
    letters = "letters"  # options listed, their letters scored
    generate = "generate"  # options listed, a free answer, from which a letter or an option's text is read
    llm_adapters = "llm_adapters"  # LLM-Adapters: 4 beams, the first label in the answer
    moe_peft = "moe_peft"  # MoE-PEFT: the likeliest next token among those of the labels
    lm_eval = "lm_eval"  # lm-evaluation-harness: its prompts, its way to cut them


class Backend(Enum):
    own = "own"
    lm_eval = "lm_eval"


class Split(Enum):
    test = "test"
    validation = "validation"  # what settings are chosen by


@dataclass(kw_only=True)
class Eval:
    limit: int | None = None  # examples a task, the first of the split
    batch_size: int = 16  # most examples of a batch
    batch_tokens: int = 4096  # most tokens of a batch, padding included; one example is always taken
    max_length: int | None = None  # tokens of prompt and answer; None: the model's window
    before: bool = True  # score the base model as well, before training
    protocol: Protocol = Protocol.auto
    num_fewshot: int = 0  # solved examples before each question, drawn from train
    fewshot_seed: int = 0
    split: Split = Split.test
    backend: Backend = Backend.own
    allow_code_execution: bool = False
    temperature: float = 0.0  # of generated answers; 0 is greedy
    num_samples: int = 1  # of each program, for pass@k; other tasks are answered once


class Tracker(Enum):
    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class Launcher(Enum):
    local = "local"
    slurm = "slurm"


@dataclass(kw_only=True)
class Slurm:
    """What a job asks SLURM for; null leaves it to the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_min: int = 240  # of one job; a run that needs more is saved, requeued and goes on
    nodes: int = 1
    gpus_per_node: int | None = None  # null: one for each process; 0: none
    cpus_per_task: int | None = None  # of a node: one task is started there, and it starts the processes
    mem_gb: float | None = None
    constraint: str | None = None
    signal_delay_s: int = 120  # seconds before the time limit at which a run is told to save
    max_requeues: int = 100  # at the time limit
    setup: list[str] = field(default_factory=list)  # shell lines before the run: module load cuda
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # of sbatch: {mail-type: END}


@dataclass(kw_only=True)
class Launch:
    """How the points of a sweep are run; none of it decides a result, except that more processes make larger steps."""

    launcher: Launcher = Launcher.local
    jobs: int | None = None  # points at a time; null: as many as there are devices, on a CPU one; SLURM: all
    processes: int = 1  # of a point, on each of its nodes; with accelerators a device each
    accelerate: str | None = None  # null: DDP; a name in configs/distributed, or a file of `accelerate config`
    slurm: Slurm = field(default_factory=Slurm)


@dataclass(kw_only=True)
class Config(Launch):
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    tasks: Mixture = field(default_factory=Mixture)
    aux_loss: dict[str, dict[str, Any]] = field(default_factory=dict)  # loss -> {coef, options of that loss}
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    seed: int = 0
    output_root: str = "runs"
    run_dir: str | None = None
    resume: str | None = None
    dry_run: bool = False
    tracker: Tracker = Tracker.none
    report: bool = True  # report.html at the end
    rank_timeout: int = 1800  # seconds that the ranks of a job wait for one of them
