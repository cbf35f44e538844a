"""Run gym-pusht's physics by calling Chipmunk from compiled code; states are bit-identical to PushTEnv.step.

A step of the environment is ten physics steps, and before each a PD controller sets the agent's velocity. Through
pymunk or cffi the calls from Python take three quarters of the time.

This is the only module that uses private names of pymunk 6: its cffi module, and the C objects behind a space and a
body.
"""

from typing import Any

import numpy as np
from jaxtyping import Float32, Float64
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from pymunk._chipmunk_cffi import ffi, lib

from pusht_act.envs.gym_pusht_internals import controller
from pusht_act.envs.simulator import compiled
from pusht_act.runtime.versions import require_version

require_version("pymunk", "6", __name__)

_NAMES = ("cpSpaceStep", "cpBodySetVelocity", "cpBodyGetVelocity", "cpBodyGetPosition", "cpBodyGetAngle")
_NOTHING, _NUMBER = ir.VoidType(), ir.DoubleType()
# The calling conventions of x86-64 and ARM64, outside of Windows, pass a struct of two doubles as two doubles.
_VECTOR = ir.LiteralStructType([_NUMBER, _NUMBER])
"""A cpVect."""


def advance(env: Any, actions: Float32[np.ndarray, "T 2"]) -> Float64[np.ndarray, "T 5"]:
    """Execute `actions` (px) in a PushTEnv without rendering, measuring or ending the episode.

    Returns:
        Agent x, y, block x, y (px) and block angle (rad) after each action.
    """
    poses = np.empty((len(actions), 5))
    objects = _address(env.space._space), _address(env.agent._body), _address(env.block._body)
    _advance(_FUNCTIONS, objects, np.asarray(actions, np.float64), *controller(env), poses)
    return poses


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


# Passed to the compiled code as arguments: addresses differ from process to process, so code that contained them
# could not be cached on disk.
_FUNCTIONS = tuple(_address(ffi.addressof(lib, name)) for name in _NAMES)


@compiled
def _advance(
    functions: tuple[int, ...],
    objects: tuple[int, int, int],
    actions: Float64[np.ndarray, "T 2"],
    substeps: int,
    dt: float,
    k_p: float,
    k_v: float,
    poses: Float64[np.ndarray, "T 5"],
) -> None:
    """Execute `actions` by the control loop of PushTEnv.step, in its order of operations."""
    step_space, set_velocity, get_velocity, get_position, get_angle = functions
    space, agent, block = objects
    for t in range(len(actions)):
        # The agent is kinematic: physics steps do not change its velocity, so it need not be read again before each.
        vx, vy = _vector_of(get_velocity, agent)
        for _ in range(substeps):
            x, y = _vector_of(get_position, agent)
            vx += (k_p * (actions[t, 0] - x) + k_v * (0 - vx)) * dt
            vy += (k_p * (actions[t, 1] - y) + k_v * (0 - vy)) * dt
            _set_vector(set_velocity, agent, vx, vy)
            _step(step_space, space, dt)
        poses[t, :2] = _vector_of(get_position, agent)
        poses[t, 2:4] = _vector_of(get_position, block)
        poses[t, 4] = _number_of(get_angle, block)


def _calling(returned: Any, result: Any, *given: Any) -> Any:
    """Generate a call of a C function for numba.

    Args:
        returned: LLVM type of what the function returns.
        result: Numba type of the same.
        given: Numba types of the arguments; the first is the function's address.
    """

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        function = ir.FunctionType(returned, [value.type for value in values[1:]]).as_pointer()
        # cffi knows the functions' types, but numba does not: the call is typed by hand.
        value = builder.call(builder.inttoptr(values[0], function), values[1:])
        if returned is _VECTOR:
            return context.make_tuple(builder, result, [builder.extract_value(value, i) for i in range(2)])
        return context.get_dummy_value() if returned is _NOTHING else value

    return result(*given), generate


@intrinsic  # type: ignore[untyped-decorator]
def _vector_of(_: Any, function: Any, body: Any) -> Any:
    return _calling(_VECTOR, types.UniTuple(types.float64, 2), function, body)


@intrinsic  # type: ignore[untyped-decorator]
def _number_of(_: Any, function: Any, body: Any) -> Any:
    return _calling(_NUMBER, types.float64, function, body)


@intrinsic  # type: ignore[untyped-decorator]
def _set_vector(_: Any, function: Any, body: Any, x: Any, y: Any) -> Any:
    return _calling(_NOTHING, types.none, function, body, x, y)


@intrinsic  # type: ignore[untyped-decorator]
def _step(_: Any, function: Any, space: Any, dt: Any) -> Any:
    return _calling(_NOTHING, types.none, function, space, dt)
