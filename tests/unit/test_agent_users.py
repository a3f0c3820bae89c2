"""Who may be what to an agent that serves containers."""

from __future__ import annotations

import os

import pytest
from lifl_gateway.agent import Users

EVERYTHING = {"coordinator", "gateway", "zygote", "worker"}


def test_an_agent_admits_its_own_user_and_root_and_nobody_else_by_itself() -> None:
    users = Users()
    assert not users.are_others
    assert users.roles_of(0) == users.roles_of(os.geteuid()) == EVERYTHING
    assert users.roles_of(os.geteuid() + 1) == set()


def test_the_nodes_user_may_be_anything_and_that_of_functions_only_what_functions_are() -> None:
    users = Users(node=65533, functions=65532)
    assert users.are_others
    assert users.roles_of(65533) == EVERYTHING
    assert users.roles_of(65532) == {"zygote", "worker"}
    assert users.roles_of(65531) == set()


@pytest.mark.parametrize("users", [Users(node=65533), Users(functions=65532)])
def test_one_of_the_two_users_is_enough(users: Users) -> None:
    assert users.are_others
