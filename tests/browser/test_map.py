"""The map in Chromium: its script computes what Python computes, and it can be used by mouse and by keyboard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.aot.compile import held_bytes
from jaxmoe.map.data import MapRequest, map_data
from jaxmoe.map.page import write_page
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.parallel.stages import PipelineSchedule, layer_segments

from ..conftest import mesh_of
from ..map.parts import answer_of, bytes_by_part
from .pages import browser, opened

pytestmark = pytest.mark.browser

ALL = "data=2,tensor=2,expert=2"
STAGES = "pipeline=2,data=2,tensor=2"
CONFIGS = Path(__file__).parent.parent / "families" / "configs"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture
def drawn(changed_dir, tmp_path):
    """(mesh, options) -> (the page of a small model, its question, its data)."""

    def draw(mesh: str, *, layers: int = 5, **asked: Any) -> tuple[Path, MapRequest, dict[str, Any]]:
        config = str(changed_dir("qwen3_moe_norm", num_hidden_layers=layers))
        question = MapRequest.of(model=config, mesh=mesh, max_num_seqs=16, context=32, chunk_tokens=32, **asked)
        data = map_data(question)
        return write_page(tmp_path / "map.html", data), question, data

    return draw


def device(page: Any, number: int) -> Any:
    return page.locator(f'[data-device="{number}"]')


@pytest.mark.parametrize(("mesh", "asked"), [(ALL, {}), (STAGES, {"virtual_stages": 2, "layout": "ep-tp-sp"})])
def test_a_device_shows_what_it_holds(mesh, asked, chromium, drawn):
    path, question, data = drawn(mesh, **asked)
    config, _ = question.checked_model()
    real = mesh_of(mesh)
    weights, kv = held_bytes(question.runner(config, real, KernelConfig()), **question.sizes)
    with opened(chromium, path) as page:
        assert page.locator("[data-device]").count() == 8
        for number, there in enumerate(real.devices.flat):
            device(page, number).focus()
            assert page.locator("#device-name").inner_text() == f"Device {number}"
            assert int(page.locator("#device-bytes").get_attribute("data-bytes")) == weights + kv
            slices = page.evaluate("device => data.arrays.map(array => slices(array, places[device]))", number)
            for array, found in zip(data["arrays"], slices, strict=True):
                sharding = NamedSharding(real, PartitionSpec(*(tuple(axes) or None for axes in array["axes"])))
                wanted = sharding.devices_indices_map(tuple(array["shape"]))[there]
                assert found == [[*part.indices(size)[:2]] for part, size in zip(wanted, array["shape"], strict=True)]
        parts = page.eval_on_selector_all(
            "#device-parts li", "all => all.map(one => [one.dataset.part, +one.dataset.bytes])"
        )
        assert dict(parts) == bytes_by_part(data["arrays"], data["mesh"])


def test_stages_hold_their_layers_and_all_hold_each_layer_once(chromium, drawn):
    path, question, _ = drawn(STAGES, virtual_stages=2)
    config, _ = question.checked_model()
    (segment,) = layer_segments(config, "scan", stages=2, virtual_stages=2)
    slots = list(segment.filled_slots())
    wanted = [
        [layer for layer, slot in enumerate(slots) if slot // (2 * segment.virtual_stage_slots) == stage]
        for stage in (0, 1)
    ]
    with opened(chromium, path) as page:
        held = page.evaluate("places.map(layersHeld)")
        stages = page.evaluate("places.map(at => at.pipeline)")
        assert [wanted[stage] for stage in stages] == held
        device(page, 0).focus()
        assert "0\u20131, 3 (3 of 5)" in page.locator("#device-holds").inner_text()


@pytest.mark.parametrize(("mesh", "phase"), [(ALL, "prefill"), (ALL, "decode"), (STAGES, "decode")])
def test_a_token_meets_every_collective_where_it_is_planned(mesh, phase, chromium, drawn):
    path, question, data = drawn(mesh)
    layers = question.checked_model()[0].num_hidden_layers
    with opened(chromium, path) as page:
        page.click(f"[data-phase={phase}]")
        events = [event for event in page.evaluate("path") if event["op"]]
        for stop in data["steps"][phase]["sites"]:
            same = [one for one in events if all(one[key] == stop[key] for key in ("location", "op", "axes", "bytes"))]
            inside = {one["layer"] for one in same}
            if stop["segment"] is not None:
                assert inside == set(range(layers)), stop
                assert {one["sent"] for one in same} == {stop["sent"]}
            else:
                assert inside == {None}, stop
        assert [event["layer"] for event in events if event["layer"] is not None] == sorted(
            event["layer"] for event in events if event["layer"] is not None
        )


def test_steps_light_links_with_their_bytes(chromium, drawn):
    path, _, data = drawn(ALL, hardware="b200")
    with opened(chromium, path) as page:
        device(page, 3).focus()
        sent = 0.0
        events = page.evaluate("path")
        for number, event in enumerate(events):
            assert int(page.locator("#position").input_value()) == number
            lit = page.locator(".link.lit").count()
            if event["op"] is None:
                assert lit == 0
            else:
                sent += event["sent"]
                assert lit == 8 + 1  # every device's link and the switch
                load = float(page.locator('[data-link="up:3"]').get_attribute("data-bytes"))
                assert load == pytest.approx(event["sent"], abs=1)
                group = math.prod(data["mesh"][axis] for axis in event["axes"])
                assert page.locator(".device.own").count() == group
                assert event["op"] in page.locator("#event").inner_text()
            assert float(page.locator("#running").get_attribute("data-bytes")) == pytest.approx(sent, abs=1)
            page.click("#forward")
        page.click("#back")
        assert int(page.locator("#position").input_value()) == len(events) - 2


def test_bytes_that_leave_a_node_take_the_network(chromium, drawn):
    path, _, _ = drawn("expert=16", hardware="b200")
    with opened(chromium, path) as page:
        at = page.evaluate("path.findIndex(event => event.location === 'dispatch')")
        sent = page.evaluate("path.find(event => event.location === 'dispatch').sent")
        page.locator("#position").fill(str(at))
        inside, beyond = (
            float(page.locator(f'[data-link="{link}:0"]').get_attribute("data-bytes")) for link in ("up", "out")
        )
        assert inside == pytest.approx(sent * 7 / 15, abs=1)
        assert beyond == pytest.approx(sent * 8 / 15, abs=1)
        assert page.locator('[data-link="network"].lit').count() == 1


def test_routes_on_a_torus_are_the_shortest(chromium, drawn):
    path, _, data = drawn("data=4,expert=4,tensor=8", hardware="v5p")
    assert data["fabric"]["shape"] == [4, 4, 8]
    with opened(chromium, path) as page:
        assert page.locator("[data-device]").count() == 128
        assert page.locator("[data-link]").count() == 3 * 128
        for a, b, hops in ((0, 1, 1), (0, 7, 1), (0, 4, 4), (0, 96, 1), (0, 127, 3), (5, 92, 2 + 1 + 1)):
            links = page.evaluate("([a, b]) => route(a, b).map(([id]) => id)", [a, b])
            assert len(links) == hops
            assert page.evaluate("ids => ids.every(id => drawn.links.has(id))", links)


def test_a_last_slice_of_fewer_devices_has_links_of_its_own(chromium, drawn, tmp_path):
    """24 devices on slices of 16: 4 x 4, then 2 x 4."""
    hardware = tmp_path / "small.toml"
    hardware.write_text('[hardware]\npreset = "v5e"\nscale_up_devices = 16\n')
    path, _, data = drawn("data=6,expert=4", hardware=str(hardware))
    assert (data["fabric"]["shape"], data["fabric"]["last_shape"]) == ([4, 4], [2, 4])
    with opened(chromium, path) as page:
        inside = page.evaluate("[...drawn.links.keys()].filter(id => id.startsWith('torus'))")
        assert len(inside) == 2 * (3 * 4) + (4 + 2 * 3)
        used = page.evaluate(
            "range(24).flatMap(a => range(24).filter(b => b !== a).flatMap(b => route(a, b).map(([id]) => id)))"
        )
        assert {link for link in used if link.startswith("torus")} == set(inside)


def test_toggles_color_devices_and_dim_links(chromium, drawn):
    path, _, _ = drawn("expert=8,tensor=2", hardware="b200", layout="ep-tp-sp")
    hues = "all => all.map(one => one.classList.contains('colored') ? one.style.getPropertyValue('--hue') : '')"
    with opened(chromium, path) as page:
        pressed = lambda name: page.locator(f'[data-axis="{name}"]').get_attribute("aria-pressed")  # noqa: E731
        assert (pressed("expert"), pressed("tensor")) == ("true", "false")
        assert len(set(page.eval_on_selector_all("[data-device]", hues))) == 8
        assert page.locator(".link.dim").count() == 0
        page.click('[data-axis="expert"]')
        assert set(page.eval_on_selector_all("[data-device]", hues)) == {""}
        page.click('[data-axis="tensor"]')
        assert len(set(page.eval_on_selector_all("[data-device]", hues))) == 2
        assert page.locator(".link.dim").count() == 16 + 2 + 1  # none leaves its node
        page.click('[data-axis="expert"]')
        assert page.evaluate("new Set([...document.querySelectorAll('.place')].map(one => one.textContent)).size") == 16
        assert page.locator('[data-axis="data"]').is_disabled()
        page.click('[data-phase="prefill"]')
        page.click('[data-axis="sequence"]')
        assert pressed("sequence") == "true"
        assert "shards of the tokens" in page.locator("#legend").inner_text()


def test_it_is_used_by_keyboard(chromium, drawn):
    path, _, _ = drawn(ALL)
    focused = "document.activeElement.dataset.device"
    with opened(chromium, path, reduced_motion="reduce") as page:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate(focused) is not None:
                break
        assert page.evaluate(focused) == "0"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.evaluate(focused) == "2"
        assert page.locator("#device-name").inner_text() == "Device 2"
        page.keyboard.press("ArrowLeft")
        assert page.evaluate(focused) == "1"
        page.keyboard.press("End")
        assert page.evaluate(focused) == "7"
        assert "tensor 1" in device(page, 7).get_attribute("aria-label")
        outline = page.evaluate("getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth")
        assert outline == "4px"
        page.keyboard.press("Space")
        assert page.locator("#play").get_attribute("aria-label") == "Pause"
        page.wait_for_function("Number(document.getElementById('position').value) >= 2")
        page.keyboard.press("Space")
        assert page.locator("#play").get_attribute("aria-label") == "Play"
        stopped = page.locator("#position").input_value()
        page.wait_for_timeout(1500)
        assert page.locator("#position").input_value() == stopped


def test_every_host_has_its_command(chromium, drawn):
    """Two nodes: the page has the command of all, a node that of its own; focus selects a command to copy it."""
    path, _, data = drawn("data=4,tensor=4", hardware="h100")
    selected = "getSelection().toString().replaceAll('\\n', '')"
    with opened(chromium, path) as page:
        shown = page.locator("#launch").inner_text()
        every = data["launch"][0].removesuffix("0") + "I"
        assert all(words in shown for words in ("Start it on every node:", every, "I = 0 … 1", "HOST0:PORT is"))
        page.locator("#launch code").focus()
        assert page.evaluate(selected) == every
        for number in (0, 7, 8, 15):
            device(page, number).focus()
            assert page.locator("#host-name").inner_text() == f"Start node {number // 8}"
            assert page.locator("#host-command").inner_text() == data["launch"][number // 8]
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.closest('#host-command') !== null"):
                break
        assert page.evaluate(selected) == data["launch"][1]


def test_one_host_has_one_command(chromium, drawn):
    path, _, data = drawn(ALL)
    with opened(chromium, path) as page:
        assert page.locator("#launch").inner_text().split("\n")[-1] == data["launch"][0]
        assert "--coordinator" not in data["launch"][0]
        assert page.locator("#host-launch").is_hidden()


@pytest.mark.parametrize("stages", [2, 4])
def test_the_timeline_is_the_schedule(stages, chromium, drawn):
    path, _, _ = drawn(f"pipeline={stages}", layers=16)
    with opened(chromium, path) as page:
        for micro_batches, virtual_stages, decode_steps in (
            (1, 1, 1),
            (2, 1, 1),
            (4, 1, 3),
            (8, 2, 1),
            (3, 4, 2),
            (9, 3, 1),
        ):
            for name, value in (("M", micro_batches), ("v", virtual_stages), ("decode-steps", decode_steps)):
                page.locator(f"#slider-{name}").fill(str(value))
            plan = PipelineSchedule(stages=stages, virtual_stages=virtual_stages, micro_batches=micro_batches)
            idle, ticks = map(int, page.locator("#idle").get_attribute("data-idle").split("/"))
            assert idle / ticks == pytest.approx(float(plan.idle(decode_steps)))
            assert ticks == plan.ticks(decode_steps)
            bubbles = page.locator("#stages rect.bubble").count()
            assert bubbles == stages * ticks * plan.idle(decode_steps)
            slots = page.evaluate(
                "([P, v, M, decodeSteps]) => { const { ticks, slot } = schedule(P, v, M, decodeSteps);"
                "return range(ticks).map(tick => range(P).map(stage => Object.values(slot(tick, stage)))); }",
                [stages, virtual_stages, micro_batches, decode_steps],
            )
            for tick in range(ticks):
                for stage in range(stages):
                    wanted = plan.slot(tick, stage, decode_steps)
                    assert slots[tick][stage] == [
                        wanted.decode_step,
                        wanted.virtual_stage,
                        wanted.micro_batch,
                        wanted.valid,
                    ]


def test_one_stage_is_said_in_words(chromium, drawn):
    path, _, _ = drawn("tensor=8")
    with opened(chromium, path) as page:
        assert "one stage" in page.locator("#stages").inner_text()
        assert page.locator("#stages svg").count() == 0


def test_what_differs_from_the_plan_is_marked(chromium, drawn, tmp_path):
    _, question, data = drawn(ALL)
    answer = answer_of(data)
    answer["collectives"][-1]["count"] += 1
    path = write_page(tmp_path / "compiled.html", map_data(question, result=answer))
    with opened(chromium, path) as page:
        page.click('[data-phase="decode"]')
        assert page.locator("#collectives tr.wrong").count() == 1
        assert "1 of" in page.locator("#collectives-note").inner_text()
        page.click('[data-phase="prefill"]')
        assert page.locator("#collectives tr.wrong").count() == 0
        assert "all as planned" in page.locator("#collectives-note").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_readable(scheme, chromium, drawn):
    """Contrast of what is written against what it stands on, as WCAG counts it."""
    path, _, _ = drawn("pipeline=2,data=2,tensor=4", hardware="b200")  # two nodes
    with opened(chromium, path, color_scheme=scheme) as page:
        pairs = page.evaluate(_COLORS)
        assert len(pairs) > 10
        for words, ink, paper in pairs:
            assert _contrast(ink, paper) >= 4.5, (words, ink, paper)


# [text, its color, the color behind it], each as red, green, blue of 0 to 255: a canvas knows every way to write one.
_COLORS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = color => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
    return "white";
  };
  const all = names => [...document.querySelectorAll(names)];
  const words = all("h1, h2, h3, p, dt, dd, li, td, th, small, label, code, button:enabled")
    .filter(node => node.textContent.trim())
    .map(node => [node.textContent.trim(), rgb(getComputedStyle(node).color), rgb(behind(node))]);
  const tiles = all(".device text, #stages text.unit").map(text => {
    const parent = text.parentElement, inTile = parent.matches(".device");
    const tile = inTile ? parent.firstElementChild : text.previousElementSibling;
    return [text.textContent, rgb(getComputedStyle(text).fill), rgb(getComputedStyle(tile).fill)];
  });
  return [...words, ...tiles];
}"""


def _contrast(one: list[int], other: list[int]) -> float:
    def luminance(color: list[int]) -> float:
        parts = [value / 255 for value in color]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_128_devices_of_a_real_model(chromium, tmp_path):
    config = str(CONFIGS / "deepseek-ai--DeepSeek-V3.json")
    mesh = "pipeline=4,expert=16,tensor=2"
    data = map_data(MapRequest.of(model=config, mesh=mesh, max_num_seqs=128, context=4096, hardware="h100"))
    path = write_page(tmp_path / "map.html", data)
    with opened(chromium, path) as page:
        assert page.locator("[data-device]").count() == 128
        device(page, 127).focus()
        assert int(page.locator("#device-bytes").get_attribute("data-bytes")) == sum(data["bytes"].values())
        holds = page.locator("#device-holds").inner_text()
        assert "240\u2013255 of 256" in holds
        held = page.evaluate("[...new Set(places.flatMap(layersHeld))].sort((a, b) => a - b)")
        assert held == list(range(61))
        for where in ("dispatch", "between stages", "head"):
            at = page.evaluate("where => path.findLastIndex(event => event.location === where)", where)
            page.locator("#position").fill(str(at))
            assert page.locator(".link.lit").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.set_viewport_size({"width": 420, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
