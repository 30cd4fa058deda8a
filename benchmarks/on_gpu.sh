#!/usr/bin/env bash
# Fifteen minutes on one GPU: exactness first, then every benchmark that takes a device.
#
#   benchmarks/on_gpu.sh [FOLDER]      results go to FOLDER, by default benchmarks/results
#
# Each part has a time limit of its own, and a part that fails does not end the rest: its output and its status stand in
# FOLDER/on_gpu.log. PYTHON names an interpreter that has the package (by default .venv/bin/python).
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
part 120 build "$python" -m nslightning.ops.kernels.build
part 30 version "$python" -m nslightning --version --verbose
part 30 "in force" "$python" -c 'from nslightning.ops.autograd import native as n; exit(n.cuda_state() != "in force" and n.cuda_state())'
part 200 exactness "$python" -m pytest -q -p no:cacheprovider -m "cuda and not slow" tests/ops/test_cuda_nodes.py tests/probes/test_cost.py \
	tests/optim/test_optim.py tests/test_on_a_gpu.py
part 60 "2^31 entries" "$python" -m pytest -q -p no:cacheprovider -m slow tests/ops/test_cuda_nodes.py
part 40 host "$python" -m benchmarks.host --device cuda --seconds 0.3 --out "$into/host_cuda.json"
small=(--device cuda --batch 128 --rounds 15 --networks "vgg11, 32x32" "resnet18, 32x32")
part 60 steps "$python" -m benchmarks.surgery "${small[@]}" --out "$into/steps_cuda.md"
part 60 steps_functional "$python" -m benchmarks.surgery --device cuda --rounds 5 --networks resnet50 inception_v3 googlenet \
	--out "$into/steps_functional_cuda.md"
part 80 ops "$python" -m benchmarks.ops --device cuda --shapes medium --seconds 0.1 --out "$into/ops_cuda.json"
part 60 ops_fp16 "$python" -m benchmarks.ops --device cuda --shapes small --dtype float16 --seconds 0.1 \
	--out "$into/ops_fp16_cuda.json"
part 60 memory "$python" -m benchmarks.memory --device cuda --out "$into"
# A step of fit beside a bare loop: eager, captured, compiled; and the released way.
fit() { # seconds name options...
	local seconds=$1 name=$2
	shift 2
	part "$seconds" "fit_$name" "$python" -m benchmarks.fit --device cuda --epochs 5 --out "$into/fit_${name}_cuda.json" "$@"
}
fit 60 fp32 --rows LeNet VGG11 --released
fit 40 fp32_captured --rows LeNet VGG11 --options --model.cuda_graph=true
fit 60 fp32_compiled --rows VGG11 --options --model.compile=true
fit 60 fp16 --precision 16-mixed --rows VGG11 ResNet-50
fit 50 fp16_captured --precision 16-mixed --rows VGG11 ResNet-50 --options --model.cuda_graph=true
part 40 optim "$python" -m benchmarks.optim --device cuda --repetitions 10 --networks vit_b_16 --out "$into/optim_cuda.json"
part 100 divergence "$python" -m benchmarks.divergence --device cuda --seconds 2 --out "$into/divergence_cuda.json"
# The same steps with the Python nodes and Triton's kernels, to compare.
NSLIGHTNING_NATIVE=1 part 60 steps_python "$python" -m benchmarks.surgery "${small[@]}" --out "$into/steps_python_cuda.md"
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}; see $log" >&2; exit 1; }
