"""Bearer tokens: who may act as whom."""

import pytest
from lifl.errors import InvalidInput, Refused
from lifl_gateway.tokens import ANYONE, Tokens


@pytest.fixture
def tokens(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("# comment\n\nalice secret-a\nbob smith secret-b\n* secret-o\n")
    return Tokens.from_file(file)


def test_without_a_file_everybody_may_do_everything():
    assert Tokens().identify(None) is ANYONE


def test_a_token_names_its_client(tokens):
    assert tokens.identify("Bearer secret-a").client == "alice"
    assert tokens.identify("bearer secret-b").client == "bob smith"
    assert tokens.identify("Bearer secret-o").is_operator


@pytest.mark.parametrize(
    "shown",
    [None, "", "Bearer", "Bearer ", "Basic secret-a", "Bearer secret", "Bearer secret-a x", "Bearer \xff\u20ac"],
)
def test_anything_else_is_unauthorized(tokens, shown):
    with pytest.raises(Refused) as caught:
        tokens.identify(shown)
    assert caught.value.status == 401


def test_a_client_may_act_for_itself_only(tokens):
    alice = tokens.identify("Bearer secret-a")
    alice.require_client("alice")
    with pytest.raises(Refused):
        alice.require_client("bob smith")
    with pytest.raises(Refused):
        alice.require_operator()


def test_an_operator_may_act_for_everybody(tokens):
    operator = tokens.identify("Bearer secret-o")
    operator.require_client("alice")
    operator.require_operator()


@pytest.mark.parametrize("text", ["", "alice\n", "a same\nb same\n"])
def test_a_useless_file_is_refused(tmp_path, text):
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(InvalidInput):
        Tokens.from_file(file)
