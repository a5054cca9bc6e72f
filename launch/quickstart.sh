#!/usr/bin/env bash
# From nothing to a trained model: set-up, real text, a tokenizer, NVFP4 pretraining on two CPU ranks that is stopped by
# SIGTERM and resumed, a BF16 baseline, a plot and some generated text. About ten minutes on two cores.
# Usage: launch/quickstart.sh [--no-baseline]
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/setup.sh

baseline=yes
[ "${1:-}" = "--no-baseline" ] && baseline=no
export OMP_NUM_THREADS=1 # two ranks on two cores; more threads would only get in each other's way
out=runs/quickstart
data=$out/data
steps=$(python -c 'import yaml; c = yaml.safe_load(open("configs/experiment/quickstart.yaml")); print(int(c["train"]["total_tokens"]) // (c["train"]["global_batch"] * c["data"]["seq_length"]))')

headline() { printf '\n=== %s\n' "$*"; }
pretrain() { torchrun --nproc-per-node 2 -m megatron_fp4.pretrain experiment=quickstart "$@"; }

rm -rf "$out/nvfp4" "$out/bf16" "$out/replay"
headline "1. Text: the sources and docstrings of this Python's standard library"
python -m data_tools.make_corpus --output "$data/corpus.jsonl"

headline "2. Tokenizer and shards"
[ -f "$data/tokenizer.model" ] || python -m data_tools.train_tokenizer "$data/corpus.jsonl" --output "$data/tokenizer.model"
python -m data_tools.tokenize "$data/corpus.jsonl" --tokenizer "$data/tokenizer.model" --output "$data/shards" --heldout-fraction 0.02

headline "3. NVFP4 pretraining, tensor parallel over two ranks, stopped half way by SIGTERM"
stop_at=$((steps / 2 + 10))
pretrain &
job=$!
trap 'kill "$job" 2>/dev/null || true' EXIT
until grep -qs "\"step\": $stop_at," "$out/nvfp4/metrics.jsonl"; do
  kill -0 "$job" 2>/dev/null || { wait "$job"; echo "the job ended before step $stop_at" >&2; exit 1; }
  sleep 0.2
done
python -m launch.signal_ranks "$job" TERM
code=0
wait "$job" || code=$?
trap - EXIT
echo "the job ended with code $code after SIGTERM"

headline "4. The same command again: it resumes from the checkpoint"
pretrain

headline "5. Proof: a run from the checkpoint before the stop, without the stop, gives the same numbers"
python -m launch.replay_check --run "$out/nvfp4" --scratch "$out/replay" --steps 20

if [ "$baseline" = yes ]; then
  headline "6. The BF16 baseline: the same weights and batches"
  pretrain precision=bf16 train.run_dir="$out/bf16" logging.wandb=disabled
fi
