#!/usr/bin/env bash
# From nothing to a trained model: set-up, real text, a tokenizer, NVFP4 pretraining on two CPU ranks that is stopped by
# SIGTERM and resumed, a BF16 baseline, a plot and some generated text. About ten minutes on two cores.
# Usage: launch/quickstart.sh [--no-baseline]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck disable=SC2034 # read by setup.sh: not all that the tests need
extras=data
source tests/setup.sh

baseline=yes
[ "${1:-}" = "--no-baseline" ] && baseline=no
export OMP_NUM_THREADS=1 # two ranks on two cores; more threads would only get in each other's way
out=runs/quickstart
data=$out/data

headline() { printf '\n=== %s\n' "$*"; }
pretrain() { launch/torchrun.sh --nproc-per-node 2 experiment=quickstart "$@"; }
metric_step() { grep -qs "\"step\": $1," "$out/nvfp4/metrics.jsonl"; }

rm -rf "$out/nvfp4" "$out/bf16" "$out/replay"
headline "1. Text: the sources and docstrings of this Python's standard library"
python -m data_tools.make_corpus --output "$data/corpus.jsonl"

headline "2. Tokenizer and shards"
python -m data_tools.train_tokenizer "$data/corpus.jsonl" --output "$data/tokenizer.model"
python -m data_tools.tokenize "$data/corpus.jsonl" --tokenizer "$data/tokenizer.model" --output "$data/shards" \
  --heldout-fraction 0.02

headline "3. NVFP4 pretraining, tensor parallel over two ranks; SIGTERM half way"
launch/torchrun.sh --nproc-per-node 2 experiment=quickstart &
job=$!
trap 'kill "$job" 2>/dev/null || true' EXIT
until metric_step 105; do
  if ! kill -0 "$job" 2>/dev/null; then
    wait "$job" || exit "$?"
    break
  fi
  sleep 0.2
done
echo ">>> kill -TERM $job"
kill -TERM "$job"
code=0
wait "$job" || code=$?
trap - EXIT
[ "$code" = 85 ] || { echo "expected exit code 85 (stopped on request, state saved), got $code" >&2; exit 1; }
echo ">>> exit code $code: stopped on request, state saved"
# Kept aside for step 5: the checkpoint before the stop.
mkdir -p "$out/replay/checkpoints"
cp -r "$out/nvfp4/checkpoints/step_00000100" "$out/replay/checkpoints/"

headline "4. The same command again resumes where it stopped"
pretrain

headline "5. Proof: from the checkpoint before the stop, without the stop, the numbers are the same"
pretrain train.run_dir="$out/replay" train.stop_after_steps=115 train.eval_interval_steps=0 logging.wandb=disabled \
  logging.tensorboard=false
megatron-fp4 report "$out/nvfp4" "$out/replay" --equal 101 115

if [ "$baseline" = yes ]; then
  headline "6. The BF16 baseline: the same initial weights, the same batches"
  pretrain precision=bf16 train.run_dir="$out/bf16" logging.wandb=disabled
  runs=("$out/bf16" "$out/nvfp4")
else
  runs=("$out/nvfp4")
fi

headline "7. Results"
megatron-fp4 report "${runs[@]}" --plot "$out/loss.png" --html "$out/report.html"
[ "$baseline" = no ] || echo "(a difference of 1 % on one seed after 200 steps is noise of a short run, no evidence for either format: docs/quickstart.md)"
megatron-fp4 evaluate "$out/nvfp4" --precision same --precision bf16
megatron-fp4 generate "$out/nvfp4" --tokens 40

cat <<END

=== Where everything is
  corpus, tokenizer, shards   $data
  checkpoints, metrics        $out/nvfp4   (metrics.jsonl, tensorboard/, wandb/, config.yaml, precision.txt)
  loss plot, report           $out/loss.png, $out/report.html (opens in any browser, without a network)

=== In a new shell, first
  cd $PWD && source $venv/bin/activate

=== What to try next (each is an override of the same command)
  launch/torchrun.sh --nproc-per-node 2 experiment=quickstart train.run_dir=runs/mine model.num_layers=4 optim.lr=1e-3
  launch/torchrun.sh --nproc-per-node 2 experiment=quickstart train.run_dir=runs/dp2 parallel.tp=1
  megatron-fp4 pretrain experiment=quickstart parallel.tp=1 --cfg          # the whole resolved configuration
  ./tests/run.sh
END
