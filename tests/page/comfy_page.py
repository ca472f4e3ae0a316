"""ComfyUI's own page in a browser: graphs put on it, what it shows, and what it sends."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import TimeoutError as OutOfTime

from devtools.server import ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Response

PICTURES = Path(__file__).resolve().parents[2] / "outputs" / "page"
# Of the slowest step on a machine that does much else: a page that is opened, a run.
PATIENCE_MS = 180_000
# Until it, things that a page says by itself a moment after a graph is there have been said.
SETTLED_MS = 1_000

READY = """() => window.app?.vueAppReady && window.app.extensionManager.spinner === false
    && window.LiteGraph.registered_node_types.AttentionReport"""
# Where on the page something of a node is; widgets know their place once they were drawn.
PLACE = """([type, part, name]) => {
    app.canvas.draw(true, true)
    const node = app.graph.nodes.find(node => node.type === type)
    let x, y
    if (part === 'widget') {
        const widget = node.widgets.find(widget => widget.name === name)
        ;[x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]
    } else if (part === 'input') {
        ;[x, y] = node.getInputPos(node.inputs.findIndex(slot => slot.name === name))
    } else {
        ;[x, y] = node.getOutputPos(Number(name))
    }
    const [left, top] = app.canvas.convertOffsetToCanvas([x, y])
    const canvas = app.canvasEl.getBoundingClientRect()
    return [canvas.left + left, canvas.top + top]
}"""


class ComfyPage:
    """One tab. Everything it waits for has a time limit.

    Attributes:
        tab: playwright's page.
    """

    def __init__(self, browser: Browser, server: ComfyServer, locale: str) -> None:
        """
        Args:
            locale: of the browser, which decides the language of the page.
        """
        context = browser.new_context(locale=locale, viewport={"width": 1600, "height": 1000})
        context.set_default_timeout(PATIENCE_MS)
        self.tab = context.new_page()
        self._server = server
        self.tab.goto(server.url, wait_until="domcontentloaded")
        self.tab.wait_for_function(READY)

    def ask(self, function: str, argument: Any = None) -> Any:
        """What a JavaScript function answers, or what its promise becomes."""
        limit = f"setTimeout(() => no(new Error('no answer in {PATIENCE_MS} ms')), {PATIENCE_MS})"
        return self.tab.evaluate(
            f"value => Promise.race([({function})(value), new Promise((_, no) => {limit})])",
            argument,
        )

    def photograph(self, name: str) -> Path:
        """Leave a picture of the page for people to look at."""
        path = PICTURES / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=path)
        return path

    def open_graph(self, document: dict[str, Any]) -> None:
        """Open a graph as a file of the editor has it."""
        self.ask("document => app.loadGraphData(document)", document)

    def open_prompt(self, nodes: dict[str, Any]) -> None:
        """Open a graph as a file of the API has it."""
        self.ask("nodes => app.loadApiJson(nodes, 'test')", nodes)

    def drop(self, node_type: str) -> None:
        """Take everything off the canvas and put one node of a type there, selected."""
        self.empty()
        self.ask(
            """type => {
                const node = LiteGraph.createNode(type)
                node.pos = [0, 0]
                app.graph.add(node)
                app.canvas.ds.scale = 1
                app.canvas.ds.offset = [250, 200]
                app.canvas.selectNode(node)
            }""",
            node_type,
        )

    def empty(self) -> None:
        """Take everything off the canvas."""
        # Not graph.clear(), which counts ids anew: the page keeps what widgets hold by id and name,
        # and a new node would show values of an old one.
        self.ask("() => [...app.graph.nodes].forEach(node => app.graph.remove(node))")

    def sent(self) -> dict[str, Any]:
        """What the page would queue: {node: {"class_type", "inputs"}}"""
        prompt = self.ask("() => app.graphToPrompt()")["output"]
        return {
            name: {"class_type": node["class_type"], "inputs": node["inputs"]}
            for name, node in prompt.items()
        }

    def widgets(self, node_type: str) -> dict[str, dict[str, Any]]:
        """{name: {"value", "label", "advanced"}} of the only node of a type, in order."""
        found = self.ask(
            """type => app.graph.nodes.find(node => node.type === type).widgets?.map(widget => [
                widget.name,
                {
                    value: widget.value,
                    label: widget.label,
                    advanced: Boolean(widget.options.advanced),
                },
            ]) ?? []""",
            node_type,
        )
        return dict(found)

    def explanation(self, node_type: str, part: str, name: str) -> Locator:
        """What the page says about a part of a node when the mouse rests on it.

        Args:
            part: "widget", "input" or "output"; outputs are named by their number.
        """
        x, y = self.ask(PLACE, [node_type, part, name])
        self.tab.mouse.move(x, y)
        return self.tab.locator(".node-tooltip")

    def again_if_closed(self, act: Callable[[int], None]) -> None:
        """Do what opens a box and fills it, once more where the page has closed the box again.

        act: (how long to wait, in ms) -> None.
        """
        for patience_ms in (10_000, 30_000):
            try:
                return act(patience_ms)
            except OutOfTime:
                self.tab.keyboard.press("Escape")
        return act(PATIENCE_MS)

    def type_into(self, node_type: str, widget: str, text: str) -> None:
        """Set a text or a number as a person does: click it, type, press Enter."""
        field = self.tab.locator(".graphdialog .value")

        def click_and_type(patience_ms: int) -> None:
            self.tab.mouse.click(*self.ask(PLACE, [node_type, "widget", widget]))
            field.fill(text, timeout=patience_ms)

        self.again_if_closed(click_and_type)
        field.press("Enter")
        field.wait_for(state="hidden")

    def choose(self, node_type: str, widget: str, option: str) -> None:
        """Choose an option as a person does: click it, click the option."""
        self.tab.mouse.click(*self.ask(PLACE, [node_type, "widget", widget]))
        menu = self.tab.locator(".litecontextmenu")
        menu.get_by_text(option, exact=True).click()
        menu.wait_for(state="hidden")

    def reopen_with(self, node_type: str, widget: str, value: Any) -> None:
        """Open the graph once more from a file in which a widget has another value.

        That may be one which the page would not let a person enter.
        """
        self.ask(
            """([type, name, value]) => {
                const node = app.graph.nodes.find(node => node.type === type)
                const place = node.widgets.findIndex(widget => widget.name === name)
                const document = app.graph.serialize()
                document.nodes.find(({id}) => String(id) === String(node.id))
                    .widgets_values[place] = value
                return app.loadGraphData(document)
            }""",
            [node_type, widget, value],
        )

    @property
    def complaint(self) -> Locator:
        """The box in which the page says that something is wrong with a graph or a run."""
        return self.tab.get_by_test_id("error-overlay")

    def run(self) -> str | None:
        """Press Run.

        Returns:
            id of the prompt, None if the server refused it.
        """

        def is_answer(response: Response) -> bool:
            return response.request.method == "POST" and response.url.endswith("/prompt")

        with self.tab.expect_response(is_answer) as answer:
            self.tab.get_by_test_id("queue-button").click()
        return answer.value.json().get("prompt_id") if answer.value.ok else None

    def end_of(self, prompt: str) -> dict[str, Any]:
        """Wait for a run; what the server's history has of it."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while prompt not in (history := self._server.get(f"/history/{prompt}")):
            assert time.monotonic() < deadline, f"no end:\n{self._server.last_lines(12)}"
            time.sleep(0.2)
        return history[prompt]
