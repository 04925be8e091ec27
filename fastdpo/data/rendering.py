"""Text and token ids of one pair: chat template, BOS, EOS, and the boundary between prompt and completion."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError

from fastdpo.data.errors import PreferenceDataError, cause
from fastdpo.data.fields import Message
from fastdpo.data.shared_prefix import Pair
from fastdpo.shown import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

#: What the code of a template can raise while it renders; RuntimeError is also that of a recursion too deep.
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class PairText(NamedTuple):
    """The prompt, and each full text, which begins with it."""

    prompt: str
    chosen: str
    rejected: str
    header_in_completion: bool = False


class PairTokens(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    boundary_merge: bool


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, conversational: bool) -> None:
    """Raises PreferenceDataError for a tokenizer without EOS, or without chat template where one is needed."""
    if tokenizer.eos_token_id is None:
        raise PreferenceDataError(
            "the tokenizer has no EOS token, so a completion could not end; set tokenizer.eos_token to the token that "
            "ends a text of this model"
        )
    if conversational and not tokenizer.chat_template:
        raise PreferenceDataError(
            "the data are conversations but the tokenizer has no chat template; set tokenizer.chat_template "
            "(--chat_template on the command line), or give the pairs as plain strings (prompt, chosen, rejected)"
        )


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Gives the tokenizer the template of a file.

    Raises FileNotFoundError where there is no file, PreferenceDataError for one that is no UTF-8 or no Jinja template.
    """
    if not path.is_file():
        raise FileNotFoundError(f"chat_template={str(path)!r}: no such file. Give a Jinja template.")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except UnicodeDecodeError as error:
        raise PreferenceDataError(
            f"chat_template={str(path)!r} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except TemplateSyntaxError as error:
        raise PreferenceDataError(
            f"chat_template={str(path)!r}, line {error.lineno}: not a valid Jinja template ({shown(error.message)})"
        ) from error
    except TEMPLATE_ERRORS as error:
        # A template may refuse these messages, and render those of the data
        logger.debug("the chat template refuses a single question: %s", error)


def render_conversation(tokenizer: PreTrainedTokenizerBase, pair: Pair, where: str) -> PairText:
    """The template's text of the prompt with the generation prompt, and of prompt + completion rendered as one.

    Some templates open an answer differently from how they ask for it (a reasoning mark in the generation prompt).
    Then, and where a completion does not begin with an answer, the prompt is what the template renders without
    generation prompt, and the header goes to the completions: it is the same in both, so it cancels in the margin.
    Raises PreferenceDataError when the template refuses the messages or renders the prompt differently once the
    completion follows.
    """

    def render(messages: list[Message], generation: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except TEMPLATE_ERRORS as error:
            roles = [message["role"] for message in messages]
            meant = isinstance(error, TemplateError)  # most often what the template itself raises
            raise PreferenceDataError(
                f"{where}: the chat template {'refuses' if meant else 'fails for'} messages with the roles {roles} "
                f"({shown(error) if meant else cause(error)}); mend the row, or set another tokenizer.chat_template"
            ) from error
        return text

    assert isinstance(pair.prompt, list)
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    chosen, rejected = render(pair.prompt + pair.chosen, False), render(pair.prompt + pair.rejected, False)
    for generation in (True, False):
        prompt = render(pair.prompt, generation)
        if chosen.startswith(prompt) and rejected.startswith(prompt):
            return PairText(prompt, chosen, rejected, header_in_completion=not generation)
    raise PreferenceDataError(
        f"{where}: the chat template renders the prompt differently when the completion follows, so the two cannot be "
        "told apart; set a tokenizer.chat_template that only appends"
    )


@dataclass
class PairEncoder:
    """Token ids of pairs given as text.

    The prompt is tokenised on its own, for so it is at inference. A completion's tokens are those of the full text
    after the prompt's. Where the prompt's tokens do not begin the full text's (a merge crosses the boundary, as in
    "A: " + "yes" with a token " yes"), the completion is tokenised on its own instead, and the pair is counted: the
    joint tokens would train on a prompt that the model never sees when it is asked.
    """

    tokenizer: PreTrainedTokenizerBase
    _prefix: list[int] = field(init=False)
    _turn_ends: set[int] = field(init=False)

    def __post_init__(self) -> None:
        probe = self._tokenize(["x"])[0]
        framed = list(self.tokenizer("x", verbose=False)["input_ids"])
        starts = (i for i in range(len(framed)) if framed[i : i + len(probe)] == probe)
        self._prefix = framed[: next(starts, 0)]
        tokenizer = self.tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        special -= {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
        self._turn_ends = special | {tokenizer.eos_token_id}

    def encode(self, texts: list[PairText], conversational: bool) -> list[PairTokens]:
        """Ids of each pair, completions with one end mark; a template brings its own BOS, a plain text gets it here."""
        prefix = [] if conversational else self._prefix
        flat = [part for text in texts for part in text[:3]]
        ids = [tokens if tokens[: len(prefix)] == prefix else prefix + tokens for tokens in self._tokenize(flat)]
        pairs = []
        for text, prompt, *fulls in zip(texts, ids[0::3], ids[1::3], ids[2::3], strict=True):
            merged = [full[: len(prompt)] != prompt for full in fulls]
            chosen, rejected = (
                self._tokenize([full_text[len(text.prompt) :]])[0] if merge else full[len(prompt) :]
                for full_text, full, merge in zip((text.chosen, text.rejected), fulls, merged, strict=True)
            )
            pairs.append(PairTokens(prompt, self._ended(chosen), self._ended(rejected), any(merged)))
        return pairs

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # of a batch whose rows were all left out; a tokenizer takes no empty list
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _ended(self, completion: list[int]) -> list[int]:
        """Cut after the end mark that the text brings, whitespace behind it ignored; else append EOS."""
        end = len(completion)
        while end and completion[end - 1] not in self._turn_ends and self._is_space(completion[end - 1]):
            end -= 1
        if end and completion[end - 1] in self._turn_ends:
            return completion[:end]
        return [*completion, self.tokenizer.eos_token_id]

    def _is_space(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()
