"""The embedded default: a small Qwen3 that is built here, in seconds, when the real one is not at hand.

It is an ordinary Hugging Face folder (config, safetensors, tokenizer, chat template), so everything
above treats it like any other model. Adapters alone can't give meaning to random token embeddings, so
these are warm-started: they come from a one-layer language model trained briefly on the plain text of
the caller's samples, without the chat format. The layers are random, and what they do is left to
LoRA. It demonstrates the program; it knows nothing about cryptography.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from finetuning.common.errors import UserError
from finetuning.common.files import fsync_files, give_mode, staging_folder

# Qwen's control tokens in the order of their ids, which follow the text vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Added, but ordinary text for `skip_special_tokens`, as in Qwen3.
MARKER_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
WEIGHTS = "model.safetensors"
VOCAB_SIZE = 1024
NUM_LAYERS = 4
MAX_POSITIONS = 32_768
# Words, single digits, punctuation runs and white space, as Qwen's tokenizer cuts them.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

WARM_START_STEPS = 300
WARM_START_ROWS = 8
WARM_START_LENGTH = 64  # tokens
WARM_START_LR = 4e-3
WARM_START_CHARACTERS = 400_000  # enough for the bundled text; bounds the time on a large one
THREADS = 1  # fixed, because their number changes the last bits; and two wait for each other

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}{{- part.text if part.text is defined else '' -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system = text(messages[0].content) if messages and messages[0].role == 'system' else '' -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') -}}
    {{- '# Tools\\n\\nThe functions you may call, one JSON object a line:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools>\\n\\nTo call one, write its name and arguments as JSON:\\n' -}}
    {{- '<tool_call>\\n{"name": "…", "arguments": {…}}\\n</tool_call><|im_end|>\\n' -}}
{%- elif messages and messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set last = namespace(question=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = text(message.content) -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set thinking = message.reasoning_content -%}
        {%- if thinking is not string and '</think>' in content -%}
            {%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > last.question and (loop.last or thinking) -%}
            {{- '<think>\\n' + (thinking or '').strip('\\n') + '\\n</think>\\n\\n' -}}
            {%- set content = content.lstrip('\\n') -%}
        {%- endif -%}
        {{- content -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set call = call.function or call -%}
            {{- '\\n' if content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": ' -}}{{- call.name | tojson -}}{{- ', "arguments": ' -}}
            {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' -}}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""


def build_embedded(texts: Sequence[str], cache_dir: Path, seed: int = 0) -> Path:
    """Build the embedded model from `texts` (or find it in the cache) and return its folder.

    The folder `cache_dir/embedded-<hash>` depends on the texts, the seed, this file's recipe and the
    library versions; the same four give the same bytes on the same kind of processor. Give only
    training texts, so that held-out ones stay unseen. It appears whole or not at all.
    """
    texts = _within_budget(texts)
    if not texts:
        raise UserError("the embedded model needs text to be built from, and there is none")
    folder = Path(cache_dir) / f"embedded-{_content_hash(texts, seed)}"
    if (folder / WEIGHTS).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder.parent, ".embedded-") as staging:
        _write_model(texts, staging, seed)
        give_mode(staging, 0o755)
        fsync_files(staging)
        try:
            staging.rename(folder)
        except OSError:  # a folder that another process finished first is as good as ours
            if not (folder / WEIGHTS).is_file():
                raise
    return folder


def banner(reason: str) -> str:
    """The lines that say, on the terminal and in the run's text, what this model is and is not."""
    return (
        "DEMONSTRATION MODEL, not Qwen3-4B-Thinking-2507.\n"
        f"Why: {reason}.\n"
        "What it is: a Qwen3 of 4 million parameters, built on this machine. Its token embeddings were "
        f"warm-started ({WARM_START_STEPS} short steps of a one-layer language model on the plain text "
        "of the training samples; held-out samples unseen), its layers are random. It shows data, "
        "training, curves and checkpoints at work; its answers mean nothing."
    )


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` ids with Qwen's control tokens and our template."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(MARKER_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in MARKER_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _model_config(tokenizer: PreTrainedTokenizerFast, num_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen3ForCausalLM"],
        dtype="float32",
    )


def _write_model(texts: Sequence[str], directory: Path, seed: int) -> None:
    tokenizer = train_tokenizer(texts)
    stream = _token_stream(texts, tokenizer)
    with _reproducible(seed):
        model = Qwen3ForCausalLM(_model_config(tokenizer, NUM_LAYERS))
        teacher = Qwen3ForCausalLM(_model_config(tokenizer, 1)).train()
        _train_on_text(teacher, stream, seed)
    weights = model.state_dict()
    weights["model.embed_tokens.weight"] = teacher.get_input_embeddings().weight.detach()
    del weights["lm_head.weight"]  # tied
    tokenizer.save_pretrained(directory)
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def _train_on_text(model: Qwen3ForCausalLM, stream: torch.Tensor, seed: int) -> None:
    """Next-token training on random windows of `stream` (n,)."""
    generator = torch.Generator().manual_seed(seed)
    length = min(WARM_START_LENGTH, len(stream) - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_START_LR, betas=(0.9, 0.95))
    for step in range(WARM_START_STEPS):
        # A short ramp, then a straight line down to a tenth.
        share = min(1.0, (step + 1) / 10) * (1 - 0.9 * step / WARM_START_STEPS)
        optimizer.param_groups[0]["lr"] = WARM_START_LR * share
        starts = torch.randint(len(stream) - length, (WARM_START_ROWS,), generator=generator)
        windows = torch.stack([stream[s : s + length + 1] for s in starts.tolist()])
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts as one row of ids (n,), each closed by `<|endoftext|>`."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, split_special_tokens=True)["input_ids"] + [tokenizer.pad_token_id]
    if len(ids) < 3:
        raise UserError("the embedded model needs text to be built from, and there is almost none")
    return torch.tensor(ids)


def _within_budget(texts: Sequence[str]) -> list[str]:
    """Every k-th text, so that no more than `WARM_START_CHARACTERS` are read."""
    texts = [text for text in texts if text.strip()]
    total = sum(map(len, texts))
    every = -(-total // WARM_START_CHARACTERS) if total else 1
    return [text[:WARM_START_CHARACTERS] for text in texts[::every]]


def _content_hash(texts: Sequence[str], seed: int) -> str:
    recipe = {
        "texts": texts,
        "seed": seed,
        "recipe": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "versions": [torch.__version__, transformers.__version__, tokenizers.__version__],
    }
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seeded, on a fixed number of threads, and without a trace on the caller's generators."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
