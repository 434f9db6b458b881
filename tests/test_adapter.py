"""Facts that a model tells about itself, through any wrapper, and the assumptions without them."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._common_utils import TrainingState
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import fastddim
from fastddim import Schedule, adapter, notices
from fastddim.loop.model_state import ModelState

from .support.models import SmallNet, elementwise_model
from .support.optional import optional

accelerate = optional("accelerate")
diffusers = optional("diffusers")

SHAPE = (1, 3, 4, 4)
COSINE = Schedule.cosine(60)
LINEAR = Schedule.linear()
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
EIGHT = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_given", set())


class Net(SmallNet):
    """A network that tells its schedule and the shape of its samples."""

    schedule = COSINE
    sample_shape = SHAPE[1:]

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t)


GLOBAL_NET = Net(seed=1).eval()


def through_a_global(x: Tensor, t: Tensor) -> Tensor:
    return GLOBAL_NET(x, t)


def another_function(x: Tensor, t: Tensor) -> Tensor:
    return through_a_global(x, t)


class Recorder(nn.Module):
    """The elementwise model, with parameters that it does not use, and the dtype of x in `seen`."""

    def __init__(self, *dtypes: torch.dtype, buffers: tuple[torch.dtype, ...] = ()) -> None:
        super().__init__()
        for i, dtype in enumerate(dtypes):
            floating = dtype.is_floating_point or dtype.is_complex
            value = torch.zeros(2).to(dtype)
            self.register_parameter(f"p{i}", nn.Parameter(value, requires_grad=floating))
        for i, dtype in enumerate(buffers):
            self.register_buffer(f"b{i}", torch.zeros(2).to(dtype))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return elementwise_model(x.float(), t)


class Says(Recorder):
    @property
    def dtype(self) -> torch.dtype:
        return BRAIN


class SaysWhatNoStateIs(Recorder):
    dtype = EIGHT


def setting(model: Recorder, dtype: Any) -> Recorder:
    model.dtype = dtype
    return model


def rounded(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The elementwise model of x in this dtype, as a function, which tells nothing."""
    return lambda x, t: elementwise_model(x.to(dtype).float(), t)


DTYPES = {
    "its parameters'": (lambda: Recorder(HALF, HALF), HALF),
    "its parameters', in double precision": (lambda: Recorder(DOUBLE), DOUBLE),
    "the state's, of parameters that differ": (lambda: Recorder(HALF, SINGLE), SINGLE),
    "the state's, of others that differ": (lambda: Recorder(BRAIN, HALF), SINGLE),
    "that of the layers not in storage": (lambda: Recorder(EIGHT, BRAIN), BRAIN),
    "the state's, of all in storage": (lambda: Recorder(EIGHT), SINGLE),
    "the state's, of integers": (lambda: Recorder(torch.int8, torch.uint8), SINGLE),
    "that of the scales of integers": (lambda: Recorder(torch.int8, HALF), HALF),
    "that of what is real": (lambda: Recorder(torch.complex64, DOUBLE), DOUBLE),
    "its buffers'": (lambda: Recorder(buffers=(torch.int64, HALF)), HALF),
    "its parameters' and not its buffers'": (lambda: Recorder(HALF, buffers=(SINGLE,)), HALF),
    "the state's, of nothing": (Recorder, SINGLE),
    "its own, of other parameters": (lambda: Says(SINGLE), BRAIN),
    "its own, of parameters that differ": (lambda: Says(HALF, SINGLE), BRAIN),
    "its own, of storage": (lambda: Says(EIGHT, SINGLE), BRAIN),
    "its own, of integers": (lambda: Says(torch.int8), BRAIN),
    "its parameters', beside one that no state has": (lambda: SaysWhatNoStateIs(HALF), HALF),
    "its parameters', beside a name": (lambda: setting(Recorder(HALF), "float16"), HALF),
    "what was set": (lambda: setting(Recorder(EIGHT), BRAIN), BRAIN),
    # As guided-diffusion does, whose last layer computes in the dtype of x.
    "the state's, of one that casts inside": (
        lambda: setting(Recorder(SINGLE, HALF), HALF),
        SINGLE,
    ),
}


@pytest.mark.parametrize(("make", "dtype"), DTYPES.values(), ids=DTYPES)
def test_x_arrives_in_the_dtype_of_the_model(make: Any, dtype: torch.dtype) -> None:
    model = make()
    x = fastddim.sample(model, 3, shape=SHAPE, seed=0, schedule=COSINE)
    assert set(model.seen) == {dtype}
    assert torch.equal(x, fastddim.sample(rounded(dtype), 3, shape=SHAPE, seed=0, schedule=COSINE))
    assert fastddim.sample(model, 3, shape=SHAPE, schedule=COSINE, dtype=DOUBLE).dtype == DOUBLE


def test_x_arrives_in_the_state_s_dtype_where_parameters_differ() -> None:
    model = Recorder(HALF, SINGLE)
    fastddim.sample(model, 1, shape=SHAPE, schedule=COSINE, dtype=BRAIN)
    assert model.seen == [BRAIN]


def test_x_arrives_in_the_dtype_of_the_model_under_autocast() -> None:
    model = Recorder(SINGLE)
    with torch.autocast("cpu", BRAIN):
        fastddim.sample(model, 1, shape=SHAPE, schedule=COSINE)
    assert model.seen == [SINGLE]


def generated(model: Any, folder: Path, **options: Any) -> None:
    fastddim.generate(
        model,
        2,
        folder / "run",
        stop=2,
        model_id="test",
        shape=(1, *SHAPE[1:]),
        **options,
    )


def streamed(model: Any, folder: Path, **options: Any) -> None:
    stream = fastddim.Stream(model, batch_size=1, shape=SHAPE, **options)
    ticket = stream.submit(2)
    stream.run()
    ticket.result()


ENTRIES: dict[str, Callable[..., Any]] = {
    "sample": lambda model, _, **options: fastddim.sample(model, 2, shape=SHAPE, **options),
    "Sampler": lambda model, _, **options: fastddim.Sampler(model, 2, shape=SHAPE, **options)(),
    "invert": lambda model, _, **options: fastddim.invert(model, torch.zeros(SHAPE), 2, **options),
    "Stream": streamed,
    "generate": lambda model, folder, **options: generated(model.eval(), folder, **options),
    "tune": lambda model, _, **options: fastddim.tune(
        model.eval(), 2, shape=SHAPE, samples=1, teacher_steps=4, progress=False, **options
    ),
}
every_entry = pytest.mark.parametrize("call", ENTRIES.values(), ids=ENTRIES)


@every_entry
@pytest.mark.filterwarnings("ignore:tuning 2 steps")
def test_model_dtype_is_taken_by_all_that_call_the_model(call: Any, tmp_path: Path) -> None:
    model = Recorder(SINGLE)
    call(model, tmp_path, schedule=COSINE, model_dtype=HALF)
    assert set(model.seen) == {HALF}


@every_entry
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("float16", TypeError, r"model_dtype: expected a torch.dtype, got 'float16' \(str\)"),
        (EIGHT, ValueError, r"model_dtype: expected one of .*torch.bfloat16, got torch.float8_"),
        (torch.int64, ValueError, r"model_dtype: expected one of .*, got torch.int64"),
    ],
)
def test_model_dtype_is_checked(
    call: Any, value: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = Recorder(SINGLE)
    with pytest.raises(error, match=message):
        call(model, tmp_path, schedule=COSINE, model_dtype=value)
    assert not model.seen


def test_model_dtype_rounds_what_the_model_reads_and_not_the_state() -> None:
    x = fastddim.sample(
        elementwise_model_in_single,
        5,
        shape=SHAPE,
        seed=0,
        schedule=COSINE,
        model_dtype=BRAIN,
        eta=1.0,
    )
    expected = fastddim.sample(rounded(BRAIN), 5, shape=SHAPE, seed=0, schedule=COSINE, eta=1.0)
    assert torch.equal(x, expected)
    assert not torch.equal(x, x.to(BRAIN))


def elementwise_model_in_single(x: Tensor, t: Tensor) -> Tensor:
    return elementwise_model(x.float(), t)


def test_a_run_goes_on_with_its_model_dtype_alone(tmp_path: Path) -> None:
    generated(Recorder(SINGLE).eval(), tmp_path, schedule=COSINE, model_dtype=BRAIN)
    with pytest.raises(ValueError, match=r'model_dtype: "bfloat16" in the folder, "float32" here'):
        generated(Recorder(SINGLE).eval(), tmp_path, schedule=COSINE)


def unet(**options: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["bare", "DataParallel"])
def test_a_unet_with_layerwise_casting_gets_what_it_computes_in(wrap: Any) -> None:
    net = unet()
    net.enable_layerwise_casting(storage_dtype=EIGHT, compute_dtype=BRAIN)
    assert net.conv_in.weight.dtype == EIGHT
    x = fastddim.sample(wrap(net), 2, schedule=LINEAR, seed=0)
    expected = fastddim.sample(
        lambda x, t: net(x.to(BRAIN), t), 2, shape=(1, 3, 8, 8), schedule=LINEAR, seed=0
    )
    assert torch.equal(x, expected)
    assert x.isfinite().all()


@pytest.mark.parametrize("storage", [EIGHT, HALF])
@pytest.mark.parametrize("library", ["diffusers", "accelerate"])
def test_a_module_with_layerwise_casting_gets_what_it_computes_in(
    library: str, storage: torch.dtype
) -> None:
    net = Recorder(SINGLE)
    net.layer = nn.Linear(2, 2)
    if library == "diffusers":
        diffusers.hooks.apply_layerwise_casting(net, storage, BRAIN, skip_modules_pattern=())
    else:
        accelerate.big_modeling.attach_layerwise_casting_hooks(net, storage, BRAIN)
    assert net.layer.weight.dtype == storage
    fastddim.sample(net, 1, shape=SHAPE, schedule=LINEAR)
    assert net.seen == [BRAIN]


def test_a_unet_with_modules_kept_in_float32_gets_the_dtype_of_the_others() -> None:
    net = unet().to(HALF)
    net._keep_in_fp32_modules = ["time_embedding", "conv_norm_out"]
    net.time_embedding.float()
    net.conv_norm_out.float()
    assert adapter.own_dtype(net) == HALF == net.dtype


class Wrapper:
    """A wrapper, as averages of weights are kept in one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.module(x, t)


def decorated(net: nn.Module) -> Any:
    @functools.wraps(net.forward)
    def call(*args: Any) -> Any:
        return net(*args)

    return call


TRANSPARENT: dict[str, Callable[[Net], Any]] = {
    "itself": lambda net: net,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "a compiled method": lambda net: torch.compile(net.denoise, backend="eager"),
    "partial": functools.partial,
    "a partial of a partial": lambda net: functools.partial(functools.partial(net)),
    "a method": lambda net: net.denoise,
    "forward": lambda net: net.forward,
    "no_grad": lambda net: torch.no_grad()(net.forward),
    "a decorated function": decorated,
    "a wrapper with .module": Wrapper,
    "several of them": lambda net: functools.partial(Wrapper(nn.DataParallel(net)).__call__),
}


@pytest.mark.parametrize("wrap", TRANSPARENT.values(), ids=TRANSPARENT)
def test_a_wrapped_network_tells_what_it_tells_alone(wrap: Any) -> None:
    net = Net().double().eval()
    model = wrap(net)
    assert adapter.own_schedule(model) is COSINE
    assert adapter.own_sample_shape(model) == SHAPE[1:]
    assert adapter.own_dtype(model) == DOUBLE
    assert adapter.own_device(model) == torch.device("cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastddim")
        x = fastddim.sample(model, 3, batch_size=2, seed=0)
    assert torch.equal(x, fastddim.sample(net, 3, batch_size=2, seed=0, schedule=COSINE))


def closure(net: nn.Module) -> Any:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t)

    return model


class Holder:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)


class Outer(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)


def called_with(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return net(x, t)


def agreeing(net: nn.Module) -> Any:
    return lambda x, t: (net(x, t) + GLOBAL_NET(x, t)) / 2


REACHING: dict[str, Callable[[], Any]] = {
    "a closure": lambda: closure(Net()),
    "a closure in another": lambda: closure(closure(nn.DataParallel(Net()))),
    "an attribute": lambda: Holder(Net()),
    "the method of such an object": lambda: Holder(Net()).__call__,
    "a module in a module": lambda: Outer(Outer(Net())),
    "the argument of a partial": lambda: functools.partial(called_with, Net()),
    "a global": lambda: through_a_global,
    "the global of another function": lambda: another_function,
    "two that agree": lambda: agreeing(Net(seed=2)),
}


@pytest.mark.parametrize("make", REACHING.values(), ids=REACHING)
def test_the_schedule_of_a_network_within_reach_is_found(make: Any) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastddim")
        x = fastddim.sample(model, 3, shape=SHAPE, seed=0)
    assert torch.equal(x, fastddim.sample(model, 3, shape=SHAPE, seed=0, schedule=COSINE))
    assert not torch.equal(x, fastddim.sample(model, 3, shape=SHAPE, seed=0, schedule=LINEAR))


def test_a_graph_depends_on_a_network_that_a_function_names() -> None:
    """A graph depends on a network that a function names: other parameters need another graph, as
    for a closure that holds the network.
    """
    state = ModelState(another_function)
    before = state.read()
    assert state.read() == before
    assert len(before[1]) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.GLOBAL_NET", SmallNet())
        assert state.read() != before
    assert state.read() == before


def disagreeing() -> Any:
    one, other = Net(), Net()
    other.schedule = Schedule.cosine(40)
    return lambda x, t: (one(x, t) + other(x, t)) / 2


def recursive() -> Any:
    def model(x: Tensor, t: Tensor, again: bool = True) -> Tensor:
        return model(x, t, False) if again else elementwise_model(x, t)

    return model


def unfilled() -> Any:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return later(x, t)

    if model is None:
        later = elementwise_model
    return model


UNTOLD: dict[str, Callable[[], Any]] = {
    "a function": lambda: elementwise_model,
    "a module": SmallNet,
    "a wrapped module": lambda: nn.DataParallel(SmallNet()),
    "a closure": lambda: closure(SmallNet()),
    "networks that disagree": disagreeing,
    "a function that calls itself": recursive,
    "a schedule of another kind": lambda: setting_schedule("linear"),
}


def setting_schedule(value: Any) -> Any:
    net = SmallNet()
    net.schedule = value
    return net


@pytest.mark.parametrize("make", UNTOLD.values(), ids=UNTOLD)
def test_without_a_schedule_the_assumption_is_named(make: Any) -> None:
    model = make()
    with pytest.warns(UserWarning, match=r"Schedule\.linear\(\), DDPM's 1000 .* schedule=") as said:
        x = fastddim.sample(model, 3, shape=SHAPE, seed=0)
    assert [w.filename for w in said] == [__file__]
    assert f"class {type(model).__qualname__} " in str(said[0].message)
    assert torch.equal(x, fastddim.sample(model, 3, shape=SHAPE, seed=0, schedule=LINEAR))


def test_a_closure_that_is_not_filled_tells_nothing() -> None:
    assert adapter.own_schedule(unfilled()) is None


@every_entry
@pytest.mark.filterwarnings("ignore:tuning 2 steps")
def test_the_assumption_is_told_once_where_the_caller_is(call: Any, tmp_path: Path) -> None:
    def twice() -> None:
        for folder in ("first", "second"):
            (tmp_path / folder).mkdir()
            call(SmallNet().eval(), tmp_path / folder)

    with pytest.warns(UserWarning, match="no schedule is given") as said:
        twice()
    told = [w for w in said if "no schedule" in str(w.message)]
    assert [w.filename for w in told] == [__file__]


def test_the_assumption_is_told_of_each_class() -> None:
    models = (SmallNet(), elementwise_model, closure(SmallNet()), SmallNet(seed=2))
    with pytest.warns(UserWarning, match="no schedule is given") as said:
        _ = [fastddim.sample(model, 1, shape=SHAPE) for model in models]
    assert ["SmallNet" in str(w.message) for w in said] == [True, False]


def test_a_warning_turned_to_an_error_is_one_again() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastddim")
        for _ in range(2):
            with pytest.raises(UserWarning, match="no schedule is given"):
                fastddim.sample(SmallNet(), 1, shape=SHAPE)


@every_entry
@pytest.mark.filterwarnings("ignore:tuning 2 steps")
def test_a_schedule_silences(call: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastddim")
        call(SmallNet().eval(), tmp_path, schedule=LINEAR)


class Elsewhere(Tensor):
    """A parameter on a device that this machine does not have."""

    @staticmethod
    def __new__(cls, device: Any) -> Elsewhere:
        return Tensor._make_wrapper_subclass(cls, (2,), device=device)

    @classmethod
    def __torch_dispatch__(cls, function: Any, classes: Any, args: Any, kwargs: Any = None) -> Any:
        assert function is torch.ops.aten.detach.default
        return cls(args[0].device)


def placed(*devices: str) -> nn.Module:
    net = nn.Module()
    for i, device in enumerate(devices):
        net.register_parameter(f"p{i}", nn.Parameter(Elsewhere(device), requires_grad=False))
    return net


def hooked(net: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


def hook(device: Any) -> Any:
    return types.SimpleNamespace(execution_device=device)


def sequence(*parts: Any) -> Any:
    return types.SimpleNamespace(hooks=parts)


def registry(**named: Any) -> Any:
    return types.SimpleNamespace(hooks=named)


GROUP = types.SimpleNamespace(group=types.SimpleNamespace(onload_device=torch.device("cuda:2")))

DEVICES: dict[str, tuple[Callable[[], Any], str | int | None]] = {
    "of its parameters": (lambda: placed("cuda:1", "cuda:1"), "cuda:1"),
    "of a hook": (lambda: hooked(placed("meta"), _hf_hook=hook("cuda:1")), "cuda:1"),
    "of a hook by number": (lambda: hooked(placed("meta"), _hf_hook=hook(1)), 1),
    "of a hook, and not of weights that wait": (
        lambda: hooked(placed("cpu"), _hf_hook=hook(torch.device("cuda", 1))),
        "cuda:1",
    ),
    "of a hook on a submodule": (
        lambda: hooked(Outer(hooked(placed("meta"), _hf_hook=hook("cuda:1"))), _hf_hook=hook(None)),
        "cuda:1",
    ),
    "of one of several hooks": (
        lambda: hooked(placed("meta"), _hf_hook=sequence(hook(None), sequence(hook("cuda:1")))),
        "cuda:1",
    ),
    "of the first hook of several devices": (
        lambda: hooked(
            Outer(hooked(placed("cuda:0", "cuda:1"), _hf_hook=hook("cuda:1"))),
            _hf_hook=hook("cuda:0"),
        ),
        "cuda:0",
    ),
    "of a hook of diffusers": (
        lambda: hooked(placed("cpu"), _diffusers_hook=registry(other=object(), offload=GROUP)),
        "cuda:2",
    ),
    "of a hook of one wrapped": (
        lambda: functools.partial(Wrapper(hooked(placed("meta"), _hf_hook=hook("cuda:1"))), y=1),
        "cuda:1",
    ),
    "none of a function": (lambda: elementwise_model, None),
    "none of a closure, which may move x": (lambda: closure(placed("cuda:1")), None),
    "none of a module without any": (nn.Identity, None),
}


@pytest.mark.parametrize(("make", "device"), DEVICES.values(), ids=DEVICES)
def test_the_device_is_where_the_model_computes(make: Any, device: str | int | None) -> None:
    found = adapter.own_device(make())
    assert (str(found) if isinstance(found, torch.device) else found) == device


NOWHERE = {
    "meta": (lambda: placed("meta"), r"on meta and .*have no values: load the weights.*got None"),
    "a hook to meta": (lambda: hooked(placed("meta"), _hf_hook=hook("meta")), "on meta and"),
    "partly on meta": (lambda: placed("meta", "cpu"), r"on cpu and meta and .*no values"),
    "two devices": (lambda: placed("cuda:1", "cpu"), r"on cpu and cuda:1 and no hook .*got None"),
}


@pytest.mark.parametrize(("make", "message"), NOWHERE.values(), ids=NOWHERE)
def test_a_model_that_is_nowhere_needs_a_device(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"device: expected the device .*{message}"):
        fastddim.sample(make(), 2, shape=SHAPE, schedule=LINEAR)


# The device of `invert` is that of its data.
@pytest.mark.parametrize("entry", [name for name in ENTRIES if name != "invert"])
def test_weights_without_values_are_an_error_that_names_the_device(
    entry: str, tmp_path: Path
) -> None:
    call = ENTRIES[entry]
    with pytest.raises(ValueError, match=r"^device: expected .* got None$"):
        call(SmallNet().to("meta").eval(), tmp_path, schedule=LINEAR)


def test_a_device_that_is_given_needs_no_telling() -> None:
    model = Recorder(SINGLE).to("meta")
    x = fastddim.sample(model, 2, shape=SHAPE, seed=0, schedule=COSINE, device="cpu")
    assert torch.equal(x, fastddim.sample(rounded(SINGLE), 2, shape=SHAPE, seed=0, schedule=COSINE))


def test_a_hook_to_a_device_that_does_not_work_here_is_named() -> None:
    net = hooked(placed("meta"), _hf_hook=hook("hpu:0"))
    with pytest.raises(ValueError, match=r"device: expected a device that works here, got 'hpu:0'"):
        fastddim.sample(net, 2, shape=SHAPE, schedule=LINEAR)


def offloaded_to_the_cpu(net: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(net, torch.device("cpu"))


def offloaded_to_disk(net: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(net, folder / "weights", torch.device("cpu"))


def offloaded_in_part(net: nn.Module, folder: Path) -> None:
    names = {name.partition(".")[0] for name, _ in net.named_parameters()}
    places = {name: "disk" if i % 2 else "cpu" for i, name in enumerate(sorted(names))}
    accelerate.dispatch_model(net, places, offload_dir=folder / "w", force_hooks=True)


def offloaded_in_groups(net: Any, folder: Path) -> None:
    diffusers.hooks.apply_group_offloading(
        net, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level"
    )


OFFLOADED = [offloaded_to_the_cpu, offloaded_to_disk, offloaded_in_part, offloaded_in_groups]


@pytest.mark.parametrize("offload", OFFLOADED)
def test_an_offloaded_network_computes_where_its_hooks_say(offload: Any, tmp_path: Path) -> None:
    net = unet()
    expected = fastddim.sample(net, 2, schedule=LINEAR, seed=0)
    offload(net, tmp_path)
    on_meta = any(p.device.type == "meta" for p in net.parameters())
    assert on_meta == (offload is not offloaded_in_groups)
    assert torch.equal(fastddim.sample(net, 2, schedule=LINEAR, seed=0), expected)


def test_a_run_of_an_offloaded_network_needs_its_name(tmp_path: Path) -> None:
    net = Net().eval()
    run = functools.partial(fastddim.generate, net, 2, stop=2, batch_size=1)
    expected = run(tmp_path / "a", model_id="test").digest
    accelerate.cpu_offload(net, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model_id: expected a string .*on meta.*got None"):
        run(tmp_path / "b")
    assert run(tmp_path / "c", model_id="test").digest == expected


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(net: Net) -> Net:
    mesh = dist.init_device_mesh("cpu", (1,))
    fully_shard(net, mesh=mesh)
    return net


PARALLEL = {
    "DistributedDataParallel": DistributedDataParallel,
    "fully_shard": sharded,
}


@pytest.mark.parametrize("wrap", PARALLEL.values(), ids=PARALLEL)
def test_a_parallel_network_tells_what_it_tells_alone(wrap: Any, process_group: None) -> None:
    net = Net().double().eval()
    expected = fastddim.sample(net, 3, batch_size=2, seed=0)
    model = wrap(net)
    assert adapter.own_schedule(model) is COSINE
    assert adapter.own_sample_shape(model) == SHAPE[1:]
    assert adapter.own_dtype(model) == DOUBLE
    assert adapter.own_device(model) == torch.device("cpu")
    assert torch.equal(fastddim.sample(model, 3, batch_size=2, seed=0), expected)


def test_a_fully_sharded_network_tells_what_it_tells_alone() -> None:
    """A fully sharded network tells the same as alone. Only its constructor needs an
    accelerator.
    """
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    model._fsdp_wrapped_module = Net().double()
    model.training_state = TrainingState.IDLE
    assert adapter.own_schedule(model) is COSINE
    assert adapter.own_sample_shape(model) == SHAPE[1:]
    assert adapter.own_dtype(model) == DOUBLE
    assert adapter.own_device(model) == torch.device("cpu")


LATE = {
    "uniform": ({"steps": 1, "spacing": "uniform"}, "0 by spacing='uniform'"),
    "quadratic": ({"steps": 1, "spacing": "quadratic"}, "0 by spacing='quadratic'"),
    "leading": ({"steps": 1, "spacing": "leading"}, "0 by spacing='leading'"),
    "offset": (
        {"steps": 1, "spacing": "leading", "steps_offset": 1},
        "1 by spacing='leading'",
    ),
    "linspace": ({"steps": 1, "spacing": "linspace"}, "0 by spacing='linspace'"),
    "timesteps": ({"steps": [200, 100]}, "200 by steps"),
}


def drawn(folder: Path, steps: Any, **visited: Any) -> Iterator[Callable[..., Any]]:
    """Each way to draw the latents of a run, with other arguments of the call."""
    common = {"shape": SHAPE, "schedule": LINEAR, **visited}
    yield lambda **given: fastddim.sample(elementwise_model, steps, **common, **given)
    yield fastddim.Sampler(elementwise_model, steps, **common)
    stream = fastddim.Stream(elementwise_model, shape=SHAPE, schedule=LINEAR)
    yield lambda **given: (stream.submit(steps, **visited, **given), stream.run())


@pytest.mark.parametrize(("visited", "first"), LATE.values(), ids=LATE)
@pytest.mark.parametrize("entry", range(3), ids=["sample", "Sampler", "Stream"])
def test_noise_for_a_state_of_data_is_told(
    entry: int, visited: dict[str, Any], first: str, tmp_path: Path
) -> None:
    call = list(drawn(tmp_path, **visited))[entry]
    with pytest.warns(UserWarning, match="x_T is drawn as noise alone") as said:
        _ = [call(seed=seed) for seed in range(2)]
    assert [w.filename for w in said] == [__file__]
    assert f"first timestep, {first}, is one" in str(said[0].message)
    alpha = LINEAR.alphas_cumprod[int(first.partition(" ")[0])].item()
    assert f"alphas_cumprod is {alpha:.4g} there; pass x_T" in str(said[0].message)


@pytest.mark.parametrize(("visited", "first"), LATE.values(), ids=LATE)
def test_a_start_that_is_given_is_the_caller_s(
    visited: dict[str, Any], first: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastddim")
        for call in drawn(tmp_path, **visited):
            call(x_T=torch.ones(SHAPE))
        steps = {name: value for name, value in visited.items() if name != "steps"}
        x_0 = torch.zeros(SHAPE)
        fastddim.invert(elementwise_model, x_0, visited["steps"], schedule=LINEAR, **steps)


def test_noise_of_a_generator_is_told() -> None:
    with pytest.warns(UserWarning, match="x_T is drawn as noise alone"):
        fastddim.sample(
            elementwise_model,
            [9],
            shape=SHAPE,
            schedule=LINEAR,
            eta=1.0,
            noise=torch.Generator().manual_seed(0),
        )


def test_a_late_start_of_a_run_is_told_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"0 by spacing='uniform'") as said:
        fastddim.generate(
            elementwise_model,
            1,
            tmp_path / "run",
            spacing="uniform",
            stop=2,
            model_id="test",
            shape=(1, *SHAPE[1:]),
            schedule=LINEAR,
        )
    assert [w.filename for w in said] == [__file__]


@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "leading", "trailing", "linspace"])
def test_other_numbers_of_steps_are_not_told_of(steps: int, spacing: Any) -> None:
    if steps == 1:
        spacing = "trailing"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastddim")
        fastddim.Sampler(elementwise_model, steps, spacing=spacing, shape=(1, 1), schedule=LINEAR)()


def test_one_step_starts_from_noise() -> None:
    model = Recorder(SINGLE)
    seen: list[int] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return model(x, t)

    fastddim.sample(watched, 1, shape=SHAPE, schedule=COSINE)
    assert seen == [COSINE.T - 1]
