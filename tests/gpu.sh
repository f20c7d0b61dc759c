#!/usr/bin/env bash
# All that needs a GPU, in two calls of under nine minutes: the tests marked gpu, a short run of each
# stack and the benchmarks; then four minutes of training by PRESET=gpu1 and, in the time that is
# left, a short run of PRESET=frontier with all of its scores.
#
#     tests/gpu.sh OUT
#     tests/gpu.sh OUT gpu1 frontier
#
# Parts are named after OUT: tests v9 byte_jepa bench gpu1 frontier; without names the first four run.
#
# It needs Python with torch, and no network: documents, tokenizer and packages that are missing
# come from .gpu/, which tests/gpu_prepare.py fills; without documents the embedded corpus is used.
# OUT gets summary.txt, each part's log, the result of each run and bench.json, each as soon as it
# exists. In the environment:
#     DEVICE=cpu    try all of it without a GPU, at small sizes
#     LIMIT=500     seconds in all; a part that takes too long is ended, the others still run
#     BENCH=--quick arguments of the benchmarks
#     PYTHON=python3
set -u
cd "$(dirname "$0")/.."
mkdir -p "${1:?a folder to write to, as: tests/gpu.sh OUT}" && out=$(cd "$1" && pwd) || exit 2
shift
parts=${*:-tests v9 byte_jepa bench}
for name in $parts; do
	case $name in tests | v9 | byte_jepa | bench | gpu1 | frontier) ;; *) echo "no part $name" && exit 2 ;; esac
done
LIMIT=${LIMIT:-500} DEVICE=${DEVICE:-cuda} BENCH=${BENCH:---quick}
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
WORK=$(mktemp -d)
export WORK
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH=$WORK/site:$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}

# What a run is cut down to: a GPU's share of a step on eight; on a CPU, next to nothing.
short="WARMUP_STEPS=4 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=20 MAX_WALLCLOCK_SECONDS=25"
v9="TRAIN_BATCH_TOKENS=98304" byte_jepa="TRAIN_BATCH_TOKENS=49152"
gpu1="VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=50 MAX_WALLCLOCK_SECONDS=240"
frontier="$short $v9 PHASED_TTT_PREFIX_DOCS=128"
if [ "$DEVICE" = cpu ]; then
	export CUDA_VISIBLE_DEVICES=
	short="$short NUM_LAYERS=2 MODEL_DIM=64 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=128 ITERATIONS=4"
	short="$short BIGRAM_VOCAB_SIZE=256 GPTQ_CALIB_TOKENS=1024 EVAL_STRIDE=0"
	v9="TRAIN_BATCH_TOKENS=1024" byte_jepa=$v9
	gpu1="$short $v9 NUM_LAYERS=4 LOOP_START=1 LOOP_END=1 PARALLEL_START_LAYER=2 EVAL_WINDOW=64"
	gpu1="$gpu1 MICRO_BATCH_TOKENS=1024 SENSITIVITY_TOKENS=128"
	frontier="$gpu1 TTT_LORA_RANK=2 PHASED_TTT_PREFIX_DOCS=8 TTT_BATCH_SIZE=8"
fi

setup() { # packages that cannot be imported, and token shards
	"$PYTHON" -c 'import platform, torch; print(platform.python_version(), torch.__version__)'
	nvidia-smi -L
	missing=
	for package in zstandard safetensors sentencepiece tqdm rich pytest hypothesis brotli constriction; do
		"$PYTHON" -c "import $package" 2>/dev/null || missing="$missing $package"
	done
	echo "missing:${missing:- nothing}"
	for package in $missing; do
		"$PYTHON" -m pip install -q --no-index --find-links .gpu/wheels --target "$WORK/site" \
			--upgrade "$package"
	done
	if [ -d .gpu/docs ]; then
		"$PYTHON" data/prepare.py .gpu/docs/* --name gpu --out "$WORK" --tokenizer .gpu/*.model &&
			"$PYTHON" data/prepare.py .gpu/docs/* --name gpu --out "$WORK" --variant byte260
	else
		"$PYTHON" data/prepare.py --out "$WORK"
	fi
}

train() { # NAME SETTING...: a run of a preset, its result beside its log
	trap : TERM # which ends the run, not what follows it
	name=$1 && shift
	kind=sp && [ "$name" = byte_jepa ] && kind=byte
	folder=$(echo "$WORK"/datasets/*_"$kind"*)
	env PRESET="$name" DATA_PATH="$folder" VOCAB_SIZE="${folder##*_"$kind"}" RUN_DIR="$WORK/$name" \
		TOKENIZER_PATH="$(echo "$WORK"/tokenizers/*.model)" "$@" "$PYTHON" train_gpt.py
	status=$?
	cp "$WORK/$name/result.json" "$OUT/$name.json"
	return $status
}

note() {
	echo "$*" | tee -a "$out/summary.txt"
}

part() { # NAME SECONDS LOG COMMAND...: run it in the time there is, keep its log, note its end
	local name=$1 bound=$2 log=$out/$3 began=$SECONDS left=$((LIMIT - SECONDS)) how
	shift 3
	[ "$bound" -lt "$left" ] || bound=$left
	if [ "$bound" -lt 1 ]; then
		note "$name: not begun, no time is left"
		return
	fi
	echo "== $name, at most $bound s"
	timeout -k 10 "$bound" "$@" >>"$log" 2>&1 </dev/null
	status=$?
	case $status in
	0) how=ok ;;
	124 | 137) how="timed out" ;;
	*) how="failed, status $status" ;;
	esac
	tail -c 8000000 "$log" >"$WORK/tail" && cp "$WORK/tail" "$log"
	tail -c 2500 "$log"
	note "$name: $how, $((SECONDS - began)) s"
}

export OUT=$out
export -f setup train
: >"$out/summary.txt"
part setup 120 summary.txt bash -c setup
for name in $parts; do
	rm -f "$out/$name.log" "$out/$name.json"
	case $name in
	tests)
		part tests 180 tests.log \
			"$PYTHON" -m pytest -o addopts= -v -m gpu --durations=5 $(grep -l mark.gpu tests/test_*.py)
		;;
	v9) part v9 150 v9.log bash -c "train v9 $short $v9" ;;
	byte_jepa) part byte_jepa 120 byte_jepa.log bash -c "train byte_jepa $short $byte_jepa" ;;
	gpu1) part gpu1 345 gpu1.log bash -c "train gpu1 $gpu1" ;;
	frontier) part frontier 400 frontier.log bash -c "train frontier $frontier" ;;
	bench)
		part bench "$LIMIT" bench.log \
			"$PYTHON" -m bench --device "$DEVICE" --out "$out/bench.json" $BENCH
		;;
	esac
done

echo "== summary"
cd "$out"
wanted='^(device:|attention:|step:.* val_bpb|size:|seconds:|final_int6_[a-z_]+ |legal_ttt |ttt_[a-z]+ |limit:|error:)'
for name in v9 byte_jepa gpu1 frontier; do
	[ -f "$name.log" ] && grep -E "$wanted" "$name.log" | sed "s/^/$name  /"
done
[ -f tests.log ] && tail -n 1 tests.log
grep -E '^(tests|setup|v9|byte_jepa|bench|gpu1|frontier): ' summary.txt
! grep -qE '^[a-z0-9_]+: (failed|timed out|not begun)' summary.txt
