"""Chats rendered by a tokenizer's template: the ids, and which of them are answers."""

import pytest
import tiny

from sklformat.distill.models.templates import ChatEncoder

TURNS = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<sep>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<bos>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<sep>"
    "{% endgeneration %}{% else %}{{ m.content }}<sep>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
INSTRUCTIONS = (
    "{% for m in messages %}{% if m.role == 'user' %}[ {{ m.content }} ]{% else %} {{ m.content }}<sep>"
    "{% endif %}{% endfor %}"
)
# Thinking stays in the last answer alone.
FORGETFUL = (
    "{% for m in messages %}<bos>{{ m.role }}\n{% if m.thinking and loop.last %}({{ m.thinking }}){% endif %}"
    "{{ m.content }}<sep>\n{% endfor %}{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
# Ends each chat with the end of text, whoever spoke last.
CLOSED = TURNS.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# Begins the thinking in the question, and drops it from the answer.
THINKING = TURNS.replace("<bos>assistant\n", "<bos>assistant\n(")
TOOLS = "{% for t in tools %}{{ t.name }}{% endfor %}" + TURNS
CHAT = [
    {"role": "system", "content": "alpha"},
    {"role": "user", "content": "beta gamma"},
    {"role": "assistant", "content": "delta epsilon"},
    {"role": "user", "content": "zeta"},
    {"role": "assistant", "content": "eta theta\n"},
]


@pytest.fixture(scope="module")
def plain():
    return tiny.with_template(tiny.train_tokenizer(tiny.make_documents()), "<bos> $A")


@pytest.fixture
def encoder(plain):
    def make(template, **settings):
        plain.chat_template = template
        return ChatEncoder(plain, **settings)

    return make


def answers_of(tokenizer, ids, answers):
    """The texts of the runs of answers."""
    runs, last = [], False
    for token, is_answer in zip(ids, answers, strict=True):
        if is_answer and not last:
            runs.append([])
        if is_answer:
            runs[-1].append(int(token))
        last = is_answer
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [TURNS, MARKED, INSTRUCTIONS, CLOSED])
def test_answers_are_what_the_model_says(plain, encoder, template):
    """An answer is its words and the token that ends the turn, however the template says so; the ids are its own."""
    chat = CHAT if template is not INSTRUCTIONS else CHAT[1:]
    ids, answers = encoder(template).encode_chat(chat)
    assert plain.apply_chat_template(chat)["input_ids"] == ids.tolist()
    space = " " if template is INSTRUCTIONS else ""
    assert [f"{space}delta epsilon<sep>", f"{space}eta theta\n<sep>"] == answers_of(plain, ids, answers)


def test_a_template_that_marks_answers_agrees_with_prefixes(encoder):
    """Both ways give the same marks where a template allows both."""
    marked, found = encoder(MARKED).encode_chat(CHAT), encoder(TURNS).encode_chat(CHAT)
    assert marked[0].tolist() == found[0].tolist()
    assert marked[1].tolist() == found[1].tolist()


def test_tools_and_their_calls_reach_the_template(plain, encoder):
    """Descriptions of tools, and messages that call them, are rendered as the template wants."""
    template = TOOLS.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].name }}")
    calls = [*CHAT[:2], {"role": "assistant", "tool_calls": [{"name": "lookup"}]}, {"role": "tool", "content": "mu"}]
    ids, answers = encoder(template).encode_chat([*calls, CHAT[2]], [{"name": "kappa"}])
    assert ["lookup<sep>", "delta epsilon<sep>"] == answers_of(plain, ids, answers)
    assert plain.decode(ids).startswith("kappa<bos>system")


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (
            FORGETFUL,
            [*CHAT[:2], {**CHAT[2], "thinking": "mu"}, *CHAT[3:]],
            "renders the first 3 of 5 messages in another way when others follow, as templates do that drop earlier",
        ),
        (
            THINKING,
            CHAT[:3],
            "asks for message 2 with other words than stand before it in the chat, as templates do that b",
        ),
        (TURNS, CHAT[2:], "begins with an answer; nothing was asked"),
        (TURNS, CHAT[:2], "no message is the assistant's; there is no answer to learn from"),
        (
            TURNS + "{{ raise_exception('roles must\nalternate') }}",
            CHAT,
            "the chat template fails: roles must alternate",
        ),
        ("{{ messages[9].content }}", CHAT, "the chat template fails: .*no element 9"),
        ("{% generation %}{% endgeneration %}ab", CHAT, "the chat template marks no token as an answer"),
        (
            TURNS,
            [*CHAT[:1], {"role": "user", "content": "a<sep>"}, *CHAT[2:]],
            "a message holds <sep>, the name of a s",
        ),
        (
            TURNS,
            [*CHAT[:2], {**CHAT[2], "tool_calls": [{"name": "mu"}]}],
            "the chat template leaves tool_calls out; take",
        ),
        (
            MARKED,
            [*CHAT[:2], {**CHAT[2], "tool_calls": [{"name": "mu"}]}],
            "the chat template leaves tool_calls out; take",
        ),
        (
            TURNS,
            [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "mu"}]}, CHAT[2]],
            "the chat template knows no content that is a list of parts; give it as text",
        ),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(encoder, template, chat, message):
    """Each has its sentence."""
    with pytest.raises(ValueError, match=message):
        encoder(template).encode_chat(chat)


def test_names_in_tools_are_refused(encoder):
    """They would become tokens as those in messages would."""
    with pytest.raises(ValueError, match="holds <sep>, the name of a special token"):
        encoder(TOOLS).encode_chat(CHAT, [{"name": "a<sep>"}])


def test_names_in_messages_are_kept_where_asked(plain, encoder):
    """--special-tokens keep takes them as tokens."""
    chat = [*CHAT[:1], {"role": "user", "content": "a<sep>b"}, CHAT[2]]
    ids, _ = encoder(TURNS, special_tokens="keep").encode_chat(chat)
    assert 4 - 1 + 1 == ids.tolist().count(plain.convert_tokens_to_ids("<sep>"))


def test_prompt_and_completion(plain, encoder):
    """Both are encoded by themselves, begun as a text is begun; the completion and the end of text are the answer."""
    ids, answers = encoder(None, is_completion=True).encode_completion("alpha ", "beta<sep>")
    assert [plain.bos_token_id, plain.eos_token_id] == [ids[0], ids[-1]]
    assert "<bos>alpha beta<sep><|endoftext|>" == plain.decode(ids)
    assert ["beta<sep><|endoftext|>"] == answers_of(plain, ids, answers)
    assert plain.convert_tokens_to_ids("<sep>") not in ids
    keep = encoder(None, is_completion=True, special_tokens="keep")
    ids, answers = keep.encode_completion("<bos>alpha ", "beta<|endoftext|>")  # which bring both
    assert "<bos>alpha beta<|endoftext|>" == plain.decode(ids)
    assert ["beta<|endoftext|>"] == answers_of(plain, ids, answers)
    with pytest.raises(ValueError, match="the tokenizer has no chat template; take the model's chat variant"):
        encoder(None)
