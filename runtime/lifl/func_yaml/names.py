"""The forms of names and values that Kubernetes asks for: each function says what is wrong, or returns None."""

from __future__ import annotations

import re
from decimal import Decimal

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_QUANTITY = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(?P<suffix>[numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]{1,3})?"
)
_POWERS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
# The first part is a registry's address if it looks like one; otherwise it belongs to the image's path.
_DOMAIN = (
    r"(?=[^/]*[.:]|localhost(?:/|$))"
    r"(?:[a-zA-Z0-9](?:[-a-zA-Z0-9.]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
)
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REGISTRY = re.compile(rf"(?:{_DOMAIN}|{_COMPONENT})(?:/{_COMPONENT})*")
_IMAGE = re.compile(
    rf"(?:{_DOMAIN}/)?{_COMPONENT}(?:/{_COMPONENT})*(?::[\w][-.\w]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?", re.ASCII
)
_MOST_LABEL = 63
_MOST_SUBDOMAIN = 253


def function_name_problem(name: str) -> str | None:
    """Why `name` cannot be a function's name, hence a Service's (a DNS label, RFC 1035); None if it can."""
    if len(name) > _MOST_LABEL:
        return f"'{name}' has {len(name)} characters, but may have {_MOST_LABEL}"
    if not _DNS_LABEL.fullmatch(name):
        return (
            f"'{name}' has to be lower-case letters, digits and '-', starting with a letter and not ending in '-'"
        )
    return None


def namespace_problem(name: str) -> str | None:
    """Why `name` cannot be a namespace's name; None if it can."""
    if len(name) > _MOST_LABEL or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
        return f"'{name}' has to be at most {_MOST_LABEL} lower-case letters, digits and '-'"
    return None


def object_name_problem(name: str) -> str | None:
    """Why `name` cannot be the name of a Secret, ConfigMap, claim, ServiceAccount or Broker; None if it can."""
    if len(name) > _MOST_SUBDOMAIN or not _DNS_SUBDOMAIN.fullmatch(name):
        return f"'{name}' has to be at most {_MOST_SUBDOMAIN} lower-case letters, digits, '-' and '.'"
    return None


def env_name_problem(name: str) -> str | None:
    """Why `name` cannot be the name of an environment variable in a container; None if it can."""
    if not _ENV_NAME.fullmatch(name):
        return f"'{name}' has to be letters, digits, '-', '_' and '.', not starting with a digit"
    return None


def qualified_name_problem(key: str) -> str | None:
    """Why `key` cannot be the key of a label or annotation, `[prefix/]name`; None if it can."""
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > _MOST_SUBDOMAIN or not _DNS_SUBDOMAIN.fullmatch(prefix)):
        return f"'{key}' has to have a domain name such as example.com before its '/'"
    if len(name) > _MOST_LABEL or not _LABEL_NAME.fullmatch(name):
        return (
            f"'{key}' has to be at most {_MOST_LABEL} letters, digits, '-', '_' and '.', with [domain/] before it"
        )
    return None


def label_value_problem(value: str) -> str | None:
    """Why `value` cannot be the value of a label; None if it can."""
    if value and (len(value) > _MOST_LABEL or not _LABEL_NAME.fullmatch(value)):
        return f"'{value}' has to be at most {_MOST_LABEL} letters, digits, '-', '_' and '.', or nothing"
    return None


def parse_quantity(text: str) -> Decimal:
    """The number that a quantity such as 500m, 1.5 or 256Mi stands for. Raises ValueError if it is none."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no quantity such as 500m, 2 or 256Mi")
    number, suffix = Decimal(match["number"]), match["suffix"] or ""
    if suffix.endswith("i"):
        return number * Decimal(1024) ** ("KMGTPE".index(suffix[0]) + 1)
    if suffix in _POWERS:
        return number.scaleb(_POWERS[suffix])
    return number.scaleb(int(suffix[1:]))


def image_problem(image: str) -> str | None:
    """Why `image` cannot be an image's reference, `[registry/]path[:tag][@sha256:...]`; None if it can."""
    if len(image) > 512 or not _IMAGE.fullmatch(image):
        return f"'{image}' has to be of the form registry/user/name:tag, in lower case"
    return None


def registry_problem(registry: str) -> str | None:
    """Why `registry` cannot be what an image's name is put behind, `registry[:port][/user]`; None if it can."""
    if len(registry) > 512 or not _REGISTRY.fullmatch(registry.rstrip("/")):
        return f"'{registry}' has to be of the form registry/user, without 'https://' and tag"
    return None
