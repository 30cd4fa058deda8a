#!/usr/bin/env bash
# What only a GPU can measure, in calls of under ten minutes each: `patching` (exactness, then what patching costs),
# `training` (what training and measuring cost) and `science` (S_01 by cuBLAS, then Figure 3).
#
#   benchmarks/on_gpu.sh [FOLDER] [PART...]      results go to FOLDER, by default benchmarks/results; all parts by default
#
# Each step has its own time limit. The limits of `patching` add up to 530 s, those of `training` to 330 s, those of
# `science` to 600 s; each call builds the C++ nodes, which takes a second where they are built. A step that fails does
# not end the rest: its output and its status stand in FOLDER/on_gpu-PART.log. PYTHON names an interpreter that has the
# package (by default .venv/bin/python). `science` needs MNIST and CIFAR-10 in the folder that NSLIGHTNING_DATA_DIR
# names; its results go to FOLDER/science, each finished cell at once, and a second call computes the missing ones.
#
# The order is that of what is asked first. Where time is short, cut from the end of a part.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
into=${1:-benchmarks/results}
parts=("${@:2}")
((${#parts[@]})) || parts=(patching training science)
for part in "${parts[@]}"; do
	[[ " patching training science " == *" $part "* ]] || {
		echo "on_gpu.sh: '$part' is not a part: patching, training, science" >&2
		exit 2
	}
done
python=${PYTHON:-.venv/bin/python}
export NSLIGHTNING_NATIVE=cuda # the C++ nodes take CUDA tensors: no GPU ran them before this script does
mkdir -p "$into"

step() { # seconds name command...
	local seconds=$1 name=$2 start=$SECONDS status=0
	shift 2
	echo "== $name" | tee -a "$log"
	timeout --kill-after=5 "$seconds" "$@" >>"$log" 2>&1 || status=$?
	echo "== $name: status $status after $((SECONDS - start)) s" | tee -a "$log"
	[[ $status == 0 ]] && return
	failed+=("$name")
	tail -n 15 "$log" # where only what is printed comes back, too
}

# Warnings of the machine's own versions of other libraries fail nothing here.
tests=("$python" -m pytest -q -p no:cacheprovider -W default)

patching() {
	step 140 exactness "${tests[@]}" -m "cuda and not slow" tests/ops/test_cuda_nodes.py tests/optim/test_optim.py \
		tests/test_on_a_gpu.py
	step 40 "2^31 entries" "${tests[@]}" -m slow tests/ops/test_cuda_nodes.py

	# One call, an operation at the memory's speed, a step, a compiled step.
	step 30 host "$python" -m benchmarks.host --device cuda --seconds 0.3 --out "$into/host_cuda.json"
	step 60 ops "$python" -m benchmarks.ops --device cuda --shapes full --seconds 0.02 --out "$into/ops_cuda.json"
	local small=(--device cuda --batch 128 --rounds 15 --networks "vgg11, 32x32")
	local large=(--device cuda --batch 64 --rounds 7 --networks resnet50)
	step 30 steps "$python" -m benchmarks.surgery "${small[@]}" --out "$into/steps_cuda.md"
	step 30 steps_autocast "$python" -m benchmarks.surgery "${small[@]}" --autocast --out "$into/steps_autocast_cuda.md"
	step 40 resnet50 "$python" -m benchmarks.surgery "${large[@]}" --out "$into/steps_resnet50_cuda.md"
	step 40 resnet50_autocast "$python" -m benchmarks.surgery "${large[@]}" --autocast \
		--out "$into/steps_resnet50_autocast_cuda.md"
	step 40 compiled "$python" -m benchmarks.compiled --device cuda --seconds 2 --networks LeNet-5 "VGG11, 32x32" \
		--out "$into/compiled_cuda.json"
}

fit() { # seconds name options...
	local seconds=$1 name=$2
	shift 2
	step "$seconds" "fit_$name" "$python" -m benchmarks.fit --device cuda --epochs 4 --out "$into/fit_${name}_cuda.json" "$@"
}

training() {
	step 30 optim "$python" -m benchmarks.optim --device cuda --repetitions 10 --networks vit_b_16 \
		--out "$into/optim_cuda.json"
	fit 30 fp32 --rows VGG11 --released
	fit 20 fp32_captured --rows VGG11 --option=--model.cuda_graph=true
	fit 40 fp16 --precision 16-mixed --rows VGG11 ResNet-50
	step 40 cells "$python" -m benchmarks.cells --device cuda --out "$into/cells_cuda.json"
	step 60 divergence "$python" -m benchmarks.divergence --device cuda --seconds 1 --out "$into/divergence_cuda.json"
	fit 30 fp16_captured --precision 16-mixed --rows VGG11 --option=--model.cuda_graph=true
}

experiment() { # seconds name experiment options...
	local seconds=$1 name=$2
	shift 2
	step "$seconds" "$name" "$python" -m nslightning experiment "$@" --device cuda --output "$into/science"
}

science() {
	[[ -d ${NSLIGHTNING_DATA_DIR:-} ]] || {
		echo "== science: NSLIGHTNING_DATA_DIR does not name a folder with MNIST and CIFAR-10" | tee -a "$log"
		failed+=(science)
		return
	}
	step 40 "orders of summation" "$python" -m benchmarks.summation --device cuda --out "$into/summation_cuda.json"
	local cells=(--scale paper --only precision=32 --only rule=exact)
	experiment 80 "S_01 by depth" mnist_volume_relu "${cells[@]}" --only 'depth=1|2|3|5|6'
	experiment 40 "S_01 by depth, TF32" mnist_volume_relu "${cells[@]}" --only 'depth=1|2|3|5|6' --set arithmetic=tf32
	# All images, ten epochs, seed 0 of all cells first.
	local seed
	for seed in 0 1 2; do
		experiment 60 "Figure 3, seed $seed" cifar10_vgg_alpha --scale small --set epochs=10 --set train_images=50000 \
			--set "seed=$seed"
		experiment 60 "Figure 3, beta, seed $seed" cifar10_vgg_beta --scale small --set epochs=10 --set train_images=50000 \
			--set "seed=$seed"
	done
}

failed=()
for part in "${parts[@]}"; do
	log=$into/on_gpu-$part.log
	: >"$log"
	"$python" -c 'import json; from benchmarks.machine import describe; print(json.dumps(describe("cuda")))' | tee -a "$log"
	step 60 build "$python" -m nslightning.ops.kernels.build
	step 20 "in force" "$python" -c \
		'from nslightning.ops.autograd import native as n; exit(n.cuda_state() != "in force" and n.cuda_state())'
	"$part"
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}; see $into/on_gpu-*.log" >&2; exit 1; }
