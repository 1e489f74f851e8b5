"""Hardware facts: what presets say, what a file may say, and what is said of one that is wrong."""

from __future__ import annotations

import pytest

from jaxmoe.errors import MeshError
from jaxmoe.parallel.mesh import parse_mesh, preset_names
from jaxmoe.planner.hardware import HardwareSpec, _not_contradicted, hardware_names, line_of, names_nodes, read_hardware

GOOD = """\
# One kind of device.
[hardware]
device = "mine"
platform = "cuda"
devices_per_node = 4
hbm_gb = 40
hbm_gib = 39.5
hbm_gbps = 1000
scale_up_gbps = 100
scale_out_gbps = 10

[tflops]
bf16 = 50

[collectives.all-reduce]
2 = [[512, 5.0], [1024, 6.0]]
"""


@pytest.fixture
def read(tmp_path):
    """Text of a file -> the hardware it says."""

    def of_text(text: str) -> HardwareSpec:
        (tmp_path / "mine.toml").write_text(text)
        return read_hardware(str(tmp_path / "mine.toml"))

    return of_text


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_hardware_and_a_mesh_it_can_hold(name):
    hardware = read_hardware(name)
    devices = 1
    for size in parse_mesh(name).values():
        devices *= size
    assert devices <= max(hardware.scale_up_devices, hardware.devices_per_node * hardware.nodes)
    assert hardware.hbm_gib <= hardware.hbm_gb
    assert hardware.device in hardware_names()  # as --hardware takes it
    assert hardware.bytes_per_s <= hardware.hbm_gbps * 1e9
    assert (name in hardware_names()) == (read_hardware(name).nodes == 1 and name != "h200-8")


def test_h100_is_what_its_source_says():
    h100 = read_hardware("h100")
    assert (h100.platform, h100.devices_per_node, h100.scale_up_devices, h100.nodes) == ("cuda", 8, 8, 1)
    assert (h100.hbm_gbps, h100.scale_up_gbps, h100.scale_out_gbps) == (3350, 450, 50)
    assert h100.tflops == {"bf16": 989, "fp8": 1978, "int8": 1978}
    assert h100.collectives["all-reduce"][8][0] == (512, 15.59)
    assert h100.collectives["all-to-all"][2][-1] == (536870912, 958.87)
    assert list(h100.collectives["all-gather"]) == [2, 4, 8]
    assert h100.flops_per_s("fp4") == h100.flops_per_s("bf16") < h100.flops_per_s("fp8")


def test_what_is_attained_scales_every_rate(read):
    mine = read(GOOD + "\n[attained]\nhbm = 1\ncompute = 0.5\nlink = 0.25\n")
    assert mine.bytes_per_s == 1000e9
    assert mine.flops_per_s("bf16") == 25e12
    assert mine.link_bytes_per_s(scale_out=False) == 25e9
    assert mine.link_bytes_per_s(scale_out=True) == 2.5e9
    assert mine.scale_up_devices == 4


def test_what_lies_between_nodes_is_read_beside_what_lies_within(read):
    mine = read(GOOD + "\n[collectives_between_nodes.all-gather]\n4 = [[2048, 30], [512, 20]]\n")
    assert mine.collectives == {"all-reduce": {2: ((512, 5), (1024, 6))}}
    assert mine.collectives_between_nodes == {"all-gather": {4: ((512, 20), (2048, 30))}}


def test_a_preset_gives_what_a_file_leaves_out(read):
    mine = read('[hardware]\npreset = "b200"\nnodes = 3\n[tflops]\nbf16 = 7\n')
    b200 = read_hardware("b200")
    assert (mine.nodes, mine.hbm_gbps, mine.tflops) == (3, b200.hbm_gbps, {**b200.tflops, "bf16": 7})


@pytest.mark.parametrize(
    ("text", "tflops"),
    [
        ("bfloat16 = 50\nfp32 = 5", {"bf16": 50, "f32": 5}), ("fp16 = 50\nfloat = 5", {"bf16": 50, "f32": 5}),
        ("half = 50\nbf16 = 50", {"bf16": 50}),
    ],
)  # fmt: skip
def test_rates_are_read_by_every_name_of_a_dtype(read, text, tflops):
    assert read(GOOD.replace("bf16 = 50", text)).tflops == tflops


@pytest.mark.parametrize(
    ("preset", "text", "table", "changed"),
    [
        ("h100", "[tflops]\nbf16 = 800\n", "tflops", {"bf16": 800}),
        ("mi300x", "[attained]\nhbm = 0.9\n", "attained", {"hbm": 0.9}),
        ("mi300x", "[attained]\ncompute = 0.3\n", "attained", {"compute": 0.3}),
        ("cpu-8", "[attained]\nhbm = 0.9\n", "attained", {"hbm": 0.9}),
        ("cpu-8", "[attained]\nhbm = 0.9\n", "collectives", {}),
        ("h100", "[collectives.all-reduce]\n2 = [[512, 5]]\n", "collectives", {"all-reduce": {2: ((512, 5),)}}),
    ],
)
def test_what_a_file_gives_of_a_table_leaves_the_rest_to_the_preset(read, preset, text, table, changed):
    base, mine = getattr(read_hardware(preset), table), getattr(read(f'[hardware]\npreset = "{preset}"\n{text}'), table)
    assert base
    assert mine == {**base, **changed}


def test_tables_measured_on_other_links_are_not_merged(read):
    mine = read(PRESET + "scale_up_gbps = 45\n[collectives.all-gather]\n2 = [[512, 5]]\n")
    assert list(mine.collectives) == ["all-gather"]


@pytest.mark.parametrize("gb", [40, 141])
def test_other_memory_of_a_preset_is_usable_in_the_same_share(read, gb):
    h100 = read_hardware("h100")
    assert read(PRESET + f"hbm_gb = {gb}\n").hbm_gib == pytest.approx(h100.hbm_gib * gb / h100.hbm_gb)
    assert read(PRESET + f"hbm_gb = {gb}\nhbm_gib = 30\n").hbm_gib == 30


def test_one_node_is_a_number_of_nodes(tmp_path):
    (tmp_path / "mine.toml").write_text(PRESET + "nodes = 1\n")
    for name in ("h200-8", "b200-2x8", str(tmp_path / "mine.toml")):
        assert names_nodes(name)
    assert not names_nodes("h200")


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(MeshError, match=r"'h10' is no preset and no TOML file; did you mean .*h100"):
        read_hardware("h10")
    with pytest.raises(MeshError, match=r"nowhere.toml cannot be read: No such file"):
        read_hardware("nowhere.toml")


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("hbm_gb = 40", "hbm_gb = ", 6, "not TOML: Invalid value"),
        ("[tflops]", "[tflops", 12, "not TOML: Expected ']'"),
        ("2 = [[512, 5.0], [1024, 6.0]]\n", "2 = [[512, 5.0], [1024, 6.0]", 16, "not TOML: Unclosed array"),
        ("hbm_gbps = 1000", "hbm_gbs = 1000", 8, "unknown key 'hbm_gbs' in [hardware]; did you mean hbm_gb"),
        ("hbm_gbps = 1000", "color = 1", 8, "unknown key 'color' in [hardware]; valid keys are device, platform"),
        ("[tflops]", "[teraflops]", 12, "unknown table [teraflops]; valid tables are axes, hardware, tflops, attained"),
        ("hbm_gbps = 1000", "hbm_gbps = true", 8, "hbm_gbps=True must be a number of at least 0"),
        ("hbm_gbps = 1000", "hbm_gbps = '1000'", 8, "hbm_gbps='1000' must be a number of at least 0"),
        ("hbm_gbps = 1000", "hbm_gbps = 0", 8, "hbm_gbps=0 must be above 0"),
        ("hbm_gbps = 1000", "hbm_gbps = nan", 8, "hbm_gbps=nan must be a number"),
        ("hbm_gbps = 1000", "hbm_gbps = inf", 8, "hbm_gbps=inf must be a number of at least 0 and below 1e+18"),
        ("bf16 = 50", "bf16 = inf", 13, "[tflops] bf16=inf must be a number above 0 and below 1e+18"),
        ("hbm_gib = 39.5", "hbm_gib = -1", 7, "hbm_gib=-1 must be a number of at least 0"),
        ("devices_per_node = 4", "devices_per_node = 4.5", 5, "devices_per_node=4.5 must be a whole number"),
        ('platform = "cuda"', 'platform = "gpu"', 4, "platform='gpu' must be one of cuda, rocm, tpu, cpu"),
        ('device = "mine"', "device = 3", 3, "device=3 must be a name"),
        ('device = "mine"', 'preset = "b20"', 3, "preset='b20' is no preset; did you mean"),
        ('device = "mine"', 'preset = "mine.toml"', 3, "preset='mine.toml' is no preset"),
        ('device = "mine"', 'preset = "b200-2x8"', 3, "preset='b200-2x8' is a mesh; did you mean b200 or gb200"),
        ('device = "mine"', "preset = [1]", 3, "preset=[1] is no preset"),
        ("hbm_gbps = 1000\n", "", 2, "has no key 'hbm_gbps' in [hardware]: add it"),
        ("[tflops]\nbf16 = 50\n", "", 2, "has no table [tflops]: add it"),
        ("bf16 = 50", "fp8 = 50", 12, "[tflops] must give bf16"),
        ("bf16 = 50", "bf16 = 50\nbf61 = 50", 14, "[tflops] bf61: valid keys are bf16, f32, fp8, int8, fp4"),
        ("bf16 = 50", "bf16 = 50\nfp16 = 51", 14, "[tflops] fp16=51 and bf16=50 differ: keep one"),
        ("bf16 = 50", "bf16 = 0", 13, "[tflops] bf16=0 must be a number above 0"),
        ("bf16 = 50", "bf16 = 50\n[attained]\nhbm = -0.5", 15, "[attained] hbm=-0.5 must be a number above 0"),
        ("[collectives.all-reduce]", "[collectives.all-reduces]", 15, "must be a table of one of all-reduce"),
        ("2 = [[512, 5.0], [1024, 6.0]]", "2 = [512, 5.0]", 16, "must be a list of [bytes, microseconds]"),
        ("2 = [[512, 5.0], [1024, 6.0]]", "2 = [[512, 5.0, 1]]", 16, "both above 0: [512, 5.0, 1]"),
        ("2 = [[512, 5.0], [1024, 6.0]]", "2 = [['512', 5.0]]", 16, "both above 0: ['512', 5.0]"),
        ("2 = [[512, 5.0], [1024, 6.0]]", "2 = [[512, -5.0]]", 16, "both above 0: [512, -5.0]"),
        ("2 = [[512, 5.0], [1024, 6.0]]", "2 = []", 16, "must be a list of [bytes, microseconds]"),
        ("2 = [", "1 = [", 16, "'1' must be a number of ranks of at least 2"),
        ("2 = [", f"{'7' * 5000} = [", 16, "must be a number of ranks of at least 2"),
        ("hbm_gbps = 1000", f"hbm_gbps = {'7' * 5000}", 8, "not TOML: a number of too many digits"),
        ("hbm_gbps = 1000", "hbm_gbps = 1e-320", 8, "hbm_gbps=1e-320 must be at least 1e-09"),
        ("bf16 = 50", "bf16 = 1e-320", 13, "[tflops] bf16=1e-320 must be at least 1e-09"),
        ("2 = [[512, 5.0], [1024, 6.0]]", "2 = [[512, 1e-320]]", 16, "both above 0: [512, 1e-320]"),
        ("bf16 = 50", "bf16 = 50\n[attained]\nhbm = 1.5", 15, "[attained] hbm=1.5 is a share of a rate: at most 1"),
        ("hbm_gib = 39.5", "hbm_gib = 395", 7, "hbm_gib=395 must not exceed the nominal memory, hbm_gb=40"),
        ("hbm_gbps = 1000", "hbm_gbps = 1000\ntorus_dims = 60", 9, "torus_dims=60 must lie in [1, 3]"),
        ("[tflops]", "[axes]\nrows = 2\n[tflops]", 13, "[axes] rows: valid axes are data, pipeline, expert, tensor"),
        ("[tflops]", '[axes]\ntensor = "x"\n[tflops]', 13, "[axes] tensor='x' must be a whole number of at least 1"),
        ("2 = [", "two = [", 16, "'two' must be a number of ranks of at least 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_file_line_and_key(read, old, new, line, said):
    assert GOOD.count(old) == 1
    with pytest.raises(MeshError) as caught:
        read(GOOD.replace(old, new))
    message = str(caught.value)
    assert f"mine.toml line {line}: " in message
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"mine.toml: hardware .* has no table \[hardware\]"),
        ("[axes]\ntensor = 2\n", r"has no table \[hardware\]"),
        ("hardware = 3\n", r"mine.toml line 1: hardware must be a table"),
        ("collectives = 3\n" + GOOD.split("[collectives")[0], r"mine.toml line 1: collectives must be a table"),
        ('tflops = "many"\n' + GOOD.split("[tflops")[0], r"mine.toml line 1: tflops must be a table"),
        ("x = " + "[" * 3000, r"not TOML"),
    ],
)
def test_files_that_hold_something_else(read, text, said):
    with pytest.raises(MeshError, match=said):
        read(text)


def test_bytes_that_are_no_text_and_folders_are_refused(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary.toml", tmp_path / "folder.toml"):
        (tmp_path / "folder.toml").mkdir(exist_ok=True)
        with pytest.raises(MeshError, match=rf"{path.name} cannot be read"):
            read_hardware(str(path))


def test_lines_of_keys():
    text = 'a.b = 1\n\n[ x . "y-z" ]  # a comment = 3\n# k = 1\n  k=2\n[[other]]\nk = 3\n'
    assert line_of(text, "a", "b") == 1
    assert line_of(text, "x", "y-z", "k") == 5
    assert line_of(text, "x", "y-z", "missing") == 3
    assert line_of(text, "other", "k") == 7
    assert line_of(text, "nothing") is None


PRESET = '[hardware]\npreset = "h100"\n'


@pytest.mark.parametrize(
    ("text", "kept", "dropped"),
    [
        ("", ["collectives"], []),
        ("scale_up_gbps = 450\n", ["collectives"], []),  # as the preset has it
        ("scale_up_gbps = 45\n", [], ["collectives"]),
        ("latency_us = 100\n", [], ["collectives"]),
        ('scale_up = "peers"\n', [], ["collectives"]),
        ("scale_out_gbps = 100\n", ["collectives"], []),
        ("hbm_gbps = 3000\n", ["collectives"], []),
        ("scale_up_gbps = 45\n[collectives.all-gather]\n2 = [[512, 5.0]]\n", ["collectives"], []),
        ("[attained]\nlink = 0.1\n", [], ["collectives"]),
        ("[attained]\nhbm = 0.7\n", ["collectives"], []),
    ],
)
def test_a_fact_of_links_is_not_contradicted_by_a_presets_measured_times(read, text, kept, dropped):
    mine = read(PRESET + text)
    assert all(getattr(mine, table) for table in kept)
    assert not any(getattr(mine, table) for table in dropped)


def test_measured_times_between_nodes_go_with_the_facts_between_nodes():
    facts = {"scale_out_gbps": 50.0, "scale_up_gbps": 450.0, "devices_per_node": 8, "scale_up": "switch"}
    based = facts | {"collectives": 1, "collectives_between_nodes": 2, "scale_up_devices": 8, "attained": {}}
    assert "collectives_between_nodes" not in _not_contradicted(based, {"scale_out_gbps": 25.0})
    assert _not_contradicted(based, {"scale_up_gbps": 45.0})["collectives_between_nodes"] == 2


def test_a_node_of_other_devices_is_a_fabric_of_other_devices(read):
    assert read(PRESET + "devices_per_node = 4\n").scale_up_devices == 4
    assert read(PRESET + "devices_per_node = 4\nscale_up_devices = 16\n").scale_up_devices == 16
    assert read('[hardware]\npreset = "v5e"\ndevices_per_node = 4\n').scale_up_devices == 256  # a slice's, not a host's


@pytest.mark.parametrize("path", ["~nobody-of-this-name/h.toml", "~nobody-of-this-name"])
def test_a_home_that_nobody_has_is_one_line(path):
    with pytest.raises(MeshError, match=r"hardware '~nobody-of-this-name.*' is not a valid path"):
        read_hardware(path)
