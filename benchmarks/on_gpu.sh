#!/usr/bin/env bash
# Under fifteen minutes on one GPU, an installation included: exactness first, then every benchmark that takes a device.
#
#   benchmarks/on_gpu.sh [FOLDER]      results go to FOLDER, by default benchmarks/results
#
# Each part has a time limit of its own; together they are 780 s, so that 120 s are left to install the package. A part
# that fails does not end the rest: its output and its status stand in FOLDER/on_gpu.log. PYTHON names an interpreter
# that has the package (by default .venv/bin/python).
#
# The order is that of what is asked first: what must be right, then what patching costs, then what training and
# measuring cost. Where time is short, cut from the end: all that follows "may be cut" repeats a row above in another
# precision or another way.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
into=${1:-benchmarks/results}
python=${PYTHON:-.venv/bin/python}
log=$into/on_gpu.log
export NSLIGHTNING_NATIVE=cuda # the C++ nodes take CUDA tensors: no GPU ran them before this script does
mkdir -p "$into"

part() { # seconds name command...
	local seconds=$1 name=$2 start=$SECONDS status=0
	shift 2
	echo "== $name" | tee -a "$log"
	timeout --kill-after=5 "$seconds" "$@" >>"$log" 2>&1 || status=$?
	echo "== $name: status $status after $((SECONDS - start)) s" | tee -a "$log"
	[[ $status == 0 ]] || failed+=("$name")
}

failed=()
: >"$log"
"$python" -c 'import json; from benchmarks.machine import describe; print(json.dumps(describe("cuda")))' | tee -a "$log"
part 60 build "$python" -m nslightning.ops.kernels.build
part 20 "in force" "$python" -c 'from nslightning.ops.autograd import native as n; exit(n.cuda_state() != "in force" and n.cuda_state())'

# Exactness.
part 140 exactness "$python" -m pytest -q -p no:cacheprovider -m "cuda and not slow" tests/ops/test_cuda_nodes.py \
	tests/optim/test_optim.py tests/test_on_a_gpu.py
part 40 "2^31 entries" "$python" -m pytest -q -p no:cacheprovider -m slow tests/ops/test_cuda_nodes.py

# What patching costs: one call, an operation at the memory's speed, a step, a compiled step.
part 30 host "$python" -m benchmarks.host --device cuda --seconds 0.3 --out "$into/host_cuda.json"
part 60 ops "$python" -m benchmarks.ops --device cuda --shapes full --seconds 0.02 --out "$into/ops_cuda.json"
small=(--device cuda --batch 128 --rounds 15 --networks "vgg11, 32x32")
large=(--device cuda --batch 64 --rounds 7 --networks resnet50)
part 30 steps "$python" -m benchmarks.surgery "${small[@]}" --out "$into/steps_cuda.md"
part 30 steps_autocast "$python" -m benchmarks.surgery "${small[@]}" --autocast --out "$into/steps_autocast_cuda.md"
part 40 resnet50 "$python" -m benchmarks.surgery "${large[@]}" --out "$into/steps_resnet50_cuda.md"
part 40 resnet50_autocast "$python" -m benchmarks.surgery "${large[@]}" --autocast \
	--out "$into/steps_resnet50_autocast_cuda.md"
part 40 compiled "$python" -m benchmarks.compiled --device cuda --seconds 2 --networks LeNet-5 "VGG11, 32x32" \
	--out "$into/compiled_cuda.json"

# What training and measuring cost.
part 30 optim "$python" -m benchmarks.optim --device cuda --repetitions 10 --networks vit_b_16 --out "$into/optim_cuda.json"
fit() { # seconds name options...
	local seconds=$1 name=$2
	shift 2
	part "$seconds" "fit_$name" "$python" -m benchmarks.fit --device cuda --epochs 4 --out "$into/fit_${name}_cuda.json" "$@"
}
fit 30 fp32 --rows VGG11 --released
fit 20 fp32_captured --rows VGG11 --options --model.cuda_graph=true
fit 40 fp16 --precision 16-mixed --rows VGG11 ResNet-50
part 40 cells "$python" -m benchmarks.cells --device cuda --out "$into/cells_cuda.json"
part 60 divergence "$python" -m benchmarks.divergence --device cuda --seconds 1 --out "$into/divergence_cuda.json"

# May be cut.
fit 30 fp16_captured --precision 16-mixed --rows VGG11 --options --model.cuda_graph=true
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}; see $log" >&2; exit 1; }
