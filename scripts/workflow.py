"""Turns a workflow as ComfyUI's browser saves it into the prompt that its `/prompt` route takes.

In: the workflow's JSON and the server's `/object_info`, which says what inputs each node has and in which order.
Out: `{node id: {"class_type": ..., "inputs": {...}}}`. It handles what plain workflows use: links, widgets, the extra
value behind seeds, notes. Muted or bypassed nodes, subgraphs and reroutes are refused, not guessed.
"""

from collections.abc import Iterator
from typing import Any

Workflow = dict[str, Any]
Prompt = dict[str, dict[str, Any]]
ObjectInfo = dict[str, dict[str, Any]]

NOTE_TYPES = {"Note", "MarkdownNote"}
# The last is a choice that may bring inputs of its own; a workflow names the choice alone.
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
SEED_NAMES = {"seed", "noise_seed"}
SEED_ACTIONS = {"fixed", "increment", "decrement", "randomize"}
ACTIVE = 0


class WorkflowError(ValueError):
    """A workflow does not fit the server's nodes; the message names the node."""


def to_prompt(workflow: Workflow, object_info: ObjectInfo) -> Prompt:
    """The prompt of `workflow` for a server whose nodes are `object_info`.

    Raises:
        WorkflowError: a node is unknown to the server, is muted or bypassed, or has too few widget values.
    """
    origins = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: Prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTE_TYPES:
            continue
        if node.get("mode", ACTIVE) != ACTIVE:
            raise WorkflowError(f"{_label(node)} is muted or bypassed: remove it from the workflow")
        if node["type"] not in object_info:
            raise WorkflowError(f"{_label(node)} is not on this server: install the pack that has it")
        inputs = _widget_values(node, object_info[node["type"]])
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = origins[socket["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def set_inputs(prompt: Prompt, class_type: str, **values: object) -> None:
    """Set inputs of every node of `class_type` in `prompt`, in place.

    Raises:
        WorkflowError: `prompt` has no such node.
    """
    nodes = [node for node in prompt.values() if node["class_type"] == class_type]
    if not nodes:
        raise WorkflowError(f"the workflow has no {class_type} node")
    for node in nodes:
        node["inputs"].update(values)


def _label(node: dict[str, Any]) -> str:
    return f"node {node['id']} ({node['type']})"


def _widget_values(node: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by name; the file holds them as a list in the order of the node's inputs."""
    stored = list(node.get("widgets_values") or [])
    values: dict[str, Any] = {}
    position = 0
    for name, options, is_required in _widgets(description):
        if position >= len(stored):
            # Written before a newer server got the input.
            if not is_required:
                break
            raise WorkflowError(f"{_label(node)} has {len(stored)} widget values, none left for `{name}`")
        values[name] = stored[position]
        position += 1
        # Browsers store what happens to a seed after each run as one more value behind it.
        is_seed = name in SEED_NAMES or options.get("control_after_generate")
        if is_seed and position < len(stored) and stored[position] in SEED_ACTIONS:
            position += 1
    return values


def _widgets(description: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    for section in ("required", "optional"):
        for name, (kind, *rest) in description["input"].get(section, {}).items():
            options = rest[0] if rest else {}
            # A list in place of a type is a choice between its members.
            if (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput"):
                yield name, options, section == "required"
