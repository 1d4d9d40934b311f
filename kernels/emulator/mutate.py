#!/usr/bin/env python3
"""Tests the tests: breaks a copy of the kernels in one way after another, and says whether scripts/emulate notices.

mutate.py [NAME...]: all mutations, or those whose names contain one of these.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES, COPY = ROOT / 'kernels/src', ROOT / 'target/emulator/mutant'
GEMM, HOPPER, RESULTS = 'linear/gemm_hopper_sm90a.cu', 'linear/hopper.cuh', 'linear/gemm_results.cuh'
NARROW, QUANT = 'linear/narrow_hopper_sm90a.cu', 'linear/gemm.cuh'
RING = 'decoding/product_hopper.cuh'
CODES = 'linear/codes_hopper_sm90a.cu'
ENTROPY = 'cross_entropy/cross_entropy_hopper_sm90a.cu'
FORWARD, BACKWARD = 'attention/hopper_forward.cuh', 'attention/hopper_backward.cuh'

# Name, test, file, what stands there, what stands there instead. An empty text changes nothing, and must pass.
MUTATIONS = [
    ('nothing', 'gemm', GEMM, '', ''),
    ('no wait for the products of the step before', 'gemm', GEMM, 'products_wait<1>();', ''),
    ('two steps of products under way', 'gemm', GEMM, 'products_wait<1>();', 'products_wait<2>();'),
    ('no wait for the last products', 'gemm', GEMM, 'products_wait<0>();\n    pin', 'pin'),
    ('sums are left where others still are', 'gemm', GEMM, 'else barrier_wait(ring.taken + 8 * consumer, slabs_phase ^ 1);', ''),
    ('a residual is added before it is there', 'gemm', GEMM, 'if (result.added) barrier_wait(ring.given + 8 * consumer, slabs_phase);\n        else',
     'if (!result.added)'),
    ('a residual is brought where sums still are', 'gemm', GEMM,
     'barrier_wait(ring.taken + 8 * consumer, slabs_phase ^ 1); // the first time: free', '// free'),
    ('results are made of sums that are not left yet', 'gemm', GEMM, 'barrier_wait(ring.left + 8 * consumer, phase);', ''),
    ('the writers make the last tile, too', 'gemm', GEMM, 'tile + gridDim.x < tiles.count; tile', 'tile < tiles.count; tile'),
    ('a writer takes the parts of another', 'gemm', GEMM, 'n0, writer, WRITERS);', 'n0, writer, WRITERS + 1);'),
    ('no wait for a stage to be full', 'gemm', GEMM, 'barrier_wait(ring.full + 8 * ring.stage, ring.phase);', ''),
    ('no wait for a stage to be empty', 'gemm', GEMM, 'barrier_wait(ring.empty + 8 * ring.stage, ring.phase ^ 1);', ''),
    ('waits for the wrong parity', 'gemm', GEMM, 'stage, ring.phase ^ 1);', 'stage, ring.phase);'),
    ('copies a stage too early', 'gemm', GEMM, 'barrier_wait(ring.empty + 8 * ring.stage, ring.phase ^ 1);',
     'barrier_wait(ring.empty + 8 * ((ring.stage + ring.STAGES - 1) % ring.STAGES), ring.phase ^ (ring.stage > 0));'),
    ('no arrival after a step', 'gemm', GEMM, 'if (step > 0 && lane == 0) barrier_arrive(ring.empty + 8 * last);', ''),
    ('no arrival after the last step', 'gemm', GEMM, 'if (threadIdx.x % WARP == 0) barrier_arrive(stage_empty);', ''),
    ('gives back the stage that is read', 'gemm', GEMM, 'barrier_arrive(ring.empty + 8 * last);\n            last',
     'barrier_arrive(ring.empty + 8 * ring.stage);\n            last'),
    ('one arrival more is awaited', 'gemm', GEMM, 's, CONSUMERS * 4)', 's, CONSUMERS * 4 + 1)'),
    ('one arrival less is awaited', 'gemm', GEMM, 's, CONSUMERS * 4)', 's, CONSUMERS * 4 - 1)'),
    ('fewer bytes are announced', 'gemm', GEMM, 'barrier_expect(barrier, ring.STAGE)', 'barrier_expect(barrier, ring.STAGE - 1024)'),
    ('no __syncthreads after the barriers are made', 'gemm', GEMM, '__syncthreads();', ''),
    ('barriers overlap', 'gemm', GEMM, 'full + MAX_STAGES * 8', 'full + (STAGES - 1) * 8'),
    ('the ring is where shared memory begins', 'gemm', GEMM, 'shared + (-shared_address(shared) & 1023)', 'shared'),
    ('no products_begin', 'gemm', GEMM, 'products_begin();', ''),
    ('sums are kept from tile to tile', 'gemm', GEMM, 'part == 0 ? step : 1);', '1);'),
    ('another swizzle', 'gemm', HOPPER, 'SWIZZLE_128 = 1', 'SWIZZLE_128 = 2'),
    ('parts of a are half as far apart', 'gemm', GEMM, 'A_PART = 16 * 2 / 16', 'A_PART = 8 * 2 / 16'),
    ('parts of b by columns are half as far apart', 'gemm', GEMM, ': 16 * ROW / 16;', ': 8 * ROW / 16;'),
    ('boxes of b are twice as far apart', 'gemm', GEMM, 'FORWARD ? 16 : BOX, 8 * ROW', 'FORWARD ? 16 : 2 * BOX, 8 * ROW'),
    ('swizzle atoms are half as far apart', 'gemm', GEMM, 'FORWARD ? 16 : BOX, 8 * ROW', 'FORWARD ? 16 : BOX, 4 * ROW'),
    ('row and column of a box swapped', 'gemm', GEMM, 'copy_box(to, a[pair], k0, m0, barrier)', 'copy_box(to, a[pair], m0, k0, barrier)'),
    ('the second pair is left out', 'gemm', GEMM, 'depths[2] = {k, rank}', 'depths[2] = {k, 0}'),
    ('the last summed pair has the depth of another', 'gemm', GEMM, 'depth4, depth5};', 'depth4, depth4};'),
    ('sums are copied before they are published', 'gemm', GEMM, 'publish_shared(); // the TMA', '// the TMA'),
    ('the last tile is copied before all of it is left', 'gemm', GEMM, 'meet<CONSUMERS * 128>(1);', ''),
    ('sums are left where the last are still copied', 'gemm', RESULTS, '        stores_commit();\n        stores_read<0>();', '        stores_commit();'),
    ('SwiGLU is copied before it is published', 'gemm', RESULTS, 'publish_shared();\n            __syncwarp();', '__syncwarp();'),
    ('SwiGLU is made anew while it is copied', 'gemm', RESULTS, 'if (lane == 0) stores_read<1>();', ''),
    ('sums are left where SwiGLU is still copied', 'gemm', RESULTS, '        if (lane == 0) stores_read<0>();', ''),
    ('logits are read before they are there', 'cross_entropy', ENTROPY, 'barrier_wait(shared + FULL + 8 * i, 0);', ''),
    ('pieces are where the first is', 'cross_entropy', ENTROPY, 'copy_bulk(shared + LOGITS + first * 4,', 'copy_bulk(shared + LOGITS,'),
    ('what blocks send is not waited for', 'cross_entropy', ENTROPY, 'wait_sent(shared + SENT, 0);', ''),
    ('sums of parts are of different largest logits', 'cross_entropy', ENTROPY, ' * exp_fast(received[i].x - row_top)', ''),
    ('logits of other parts come never before the label', 'cross_entropy', ENTROPY, 'fmaxf(row_earlier, received[i].z)', 'earlier'),
    ("the label's gradient is as the others'", 'cross_entropy', ENTROPY, 'row_top) - scale);', 'row_top));'),
    ("the label's gradient is that of another part, too", 'cross_entropy', ENTROPY, 'if (at < count && at', 'if (at'),
    ('sums begin as they are', 'narrow', NARROW, 'sums[g][i] = 0.0f', ''),
    ('slices overlap', 'narrow', NARROW, 'begin + sizes.slice,', 'begin + sizes.slice + 1,'),
    ('a copy is not waited for', 'quant', QUANT, 'wait_copies(r0 ? 0 : stages - 1);', ''),
    ('a tile is read by ldmatrix too early', 'quant', QUANT, '                wait_copies(stages - 2);', ''),
    ('a step is decoded before it is there', 'codes', CODES, 'barrier_wait(places.full + 8 * turn.stage, turn.phase);', ''),
    ('tables are made anew while they are read', 'codes', CODES, 'barrier_wait(places.empty + 8 * turn.stage, turn.phase ^ 1);', ''),
    ('left operands are decoded anew while they are read', 'codes', CODES, 'multiply_step(step + 1, b, a);', 'multiply_step(step + 1, b, b);'),
    ('the table of scales is read before it is there', 'codes', CODES, 'meet<128>(1 + CONSUMERS);', ''),
    ('sums of other blocks are not waited for', 'codes', CODES, '        wait_at(counter, work.shares);', ''),
    ('counters are left as they are', 'codes', CODES, 'if (thread % 128 == 0) leave(counter, work.shares);', ''),
    ('a slab of shared sums is read before it is there', 'codes', CODES, 'meet<128>(barrier); // the slab', '// the slab'),
    ('a stage is given back while it is multiplied', 'codes', CODES, 'products_wait<1>();\n        pin(next);', 'pin(next);'),
    ('shares overlap', 'codes', CODES, 'last = steps * (share + 1) / shares;', 'last = (steps * (share + 1) + shares - 1) / shares;'),
    ('scores are read while they are made', 'attention', FORWARD, 'products_wait<1>();\n            pin(s);', 'pin(s);'),
    ('values are not waited for', 'attention', FORWARD, 'barrier_wait(v_full + 8 * v_stage, v_phase);', ''),
    ('Q is not given back', 'attention', FORWARD, 'if (block == 0) done_with(q_empty);', ''),
    ('P is made anew while a product reads it', 'attention', FORWARD, 'products_wait<0>();\n            pin(acc);', 'pin(acc);'),
    ('dS is not published', 'attention', BACKWARD, 'publish_shared();\n            products_wait<0>();', 'products_wait<0>();'),
    ('dS is read before both halves are there', 'attention', BACKWARD, 'meet<256>(1);\n            make_dq(last);', 'make_dq(last);'),
    ('a part of dQ is made anew while it is added', 'attention', BACKWARD, 'stores_read<0>();', ''),
    ('dQ is copied where it should be added', 'attention', BACKWARD, 'work.turn == 0);', 'true);'),
    ('codes and scales are not waited for', 'decoding', RING, 'barrier_wait(places.full + 8 * stage, turn / STAGES % 2);', ''),
    ('codes are brought too early', 'decoding', RING, 'if (turn >= STAGES) barrier_wait(places.empty + 8 * stage, turn / STAGES % 2 ^ 1);', ''),
    ('sums of a tile are made anew while they are read', 'decoding', RING, 'barrier_wait(places.taken + turn % 2 * 8, turn / 2 % 2 ^ 1);', ''),
    ('sums of other blocks are not waited for', 'decoding', RING, 'wait_sent(arrived, At::parity(turn));', ''),
    ('a block is told of places when it may have ended', 'decoding', RING, ' && turn + 2 * At::PERIOD < turns', ''),
    ('scales beyond a warp\'s last are used', 'decoding', RING, 'u + 1 < count, x', 'true, x'),
]


def emulate(test, sources):
    """Whether the test passes, and the first line that says why not."""
    command = [ROOT / 'scripts/emulate', '--sources', sources, test]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).splitlines()
    if 'emulate: does not compile' in lines:
        sys.exit('\n'.join(lines))
    reasons = [line for line in lines if re.match('WRONG|EMULATOR', line) or 'runtime error' in line or 'status 124' in line]
    return run.returncode == 0, (reasons + [''])[0]


def main():
    missed = 0
    for name, test, path, old, new in MUTATIONS:
        if len(sys.argv) > 1 and not any(part in name for part in sys.argv[1:]):
            continue
        shutil.rmtree(COPY, ignore_errors=True)
        shutil.copytree(SOURCES, COPY, ignore=shutil.ignore_patterns('*.rs'))
        text = (COPY / path).read_text()
        if old not in text:
            sys.exit(f'{name}: {path} has no {old!r} any more')
        (COPY / path).write_text(text.replace(old, new, 1))
        passes, reason = emulate(test, COPY)
        as_it_should = passes == (old == new)
        missed += not as_it_should
        print(f'{name}: {"passes" if passes else "found"}{"" if as_it_should else " (!)"}  {reason}', flush=True)
    return missed > 0


sys.exit(main())
