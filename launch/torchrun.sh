#!/bin/bash
# Start a training run with torchrun, on this node or as one node of several.
#
#   launch/torchrun.sh --nproc-per-node 8 experiment=NAME key=value ...
#   launch/torchrun.sh --nproc-per-node 8 --multirun experiment=NAME optim.lr=1e-3,3e-3   (one run after the other)
#   launch/torchrun.sh --nproc-per-node 8 --nnodes 2 --node-rank 0 --master-addr HOST experiment=NAME ...   (each node)
#   launch/torchrun.sh --nproc-per-node 8 evaluate RUN        another command of megatron-fp4: its name comes first
#
# Everything from the first argument that is no launch option (or from `--`) goes to the program as it is, spaces and
# quotes included. The exit code is the program's: 0 done, 2 configuration error, 85 stopped on request with the
# state saved (start the same command again to go on), anything else a failure. SIGTERM, SIGUSR1 and Ctrl-C go to the
# ranks; the second Ctrl-C ends them at once.
#
# Variables: MEGATRON_FP4_MODULE (what to run, default megatron_fp4.pretrain), MEGATRON_FP4_PYTHON (interpreter,
# default .venv/bin/python of this checkout, else python3), and those of launch/env.sh.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | head -n -1; }
die() { echo "launch/torchrun.sh: $*" >&2; exit 2; }
is_count() { [[ $1 =~ ^[0-9]+$ ]]; }

nproc_per_node='' nnodes=1 node_rank='' master_addr='' master_port=29500
while (($#)); do
  case $1 in
    --nproc-per-node | --nnodes | --node-rank | --master-addr | --master-port)
      (($# >= 2)) || die "$1 needs a value"
      name=${1#--}
      printf -v "${name//-/_}" '%s' "$2"
      shift 2
      ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --multirun | --cfg | --config-dir | --config-dir=*) break ;; # the program's own
    --*) die "unknown option $1; see launch/torchrun.sh --help" ;;
    *) break ;;
  esac
done

[[ $nproc_per_node ]] || die "--nproc-per-node is missing: the number of processes on each node, one for each GPU"
for name in nproc_per_node nnodes master_port; do
  { is_count "${!name}" && ((${!name} > 0)); } || die "--${name//_/-} ${!name}: must be a whole number above 0"
done

# A rendezvous on the loopback interface exists once on each node: the nodes would wait for each other until the
# time-out, or worse, train on their own.
is_loopback() { [[ $1 == localhost || $1 == localhost.* || $1 == 127.* || $1 == ::1 ]]; }
if ((nnodes > 1)); then
  [[ $master_addr ]] || die "--nnodes $nnodes needs --master-addr, the host name of node 0; there is no default"
  { is_count "$node_rank" && ((node_rank < nnodes)); } ||
    die "--node-rank '$node_rank': must be 0 to $((nnodes - 1)) with --nnodes $nnodes"
  if is_loopback "$master_addr"; then
    die "--master-addr $master_addr is a loopback address: the other nodes cannot reach it; give node 0's host name"
  fi
  # Node 0 may see its own name as 127.0.1.1 (Debian's /etc/hosts) and still listens on every interface. The others
  # must resolve it; where names appear with the machines (Kubernetes) that can take a while after the start.
  if ((node_rank > 0)); then
    address=''
    for ((attempt = 0; attempt < 24; attempt++)); do
      address=$(getent hosts "$master_addr" | awk '{print $1; exit}') || true
      if [[ $address ]]; then break; fi
      sleep 5
    done
    [[ $address ]] || die "--master-addr $master_addr does not resolve on $(hostname), for 2 minutes now"
    if is_loopback "$address"; then
      die "--master-addr $master_addr is $address on $(hostname), a loopback address; mend /etc/hosts, or give an" \
        "address that node $node_rank can reach"
    fi
  fi
  rendezvous=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$master_addr" --master-port "$master_port")
else
  [[ -z $master_addr && -z $node_rank ]] || die "--master-addr and --node-rank have no effect with one node"
  rendezvous=(--standalone) # torchrun takes a free port: two runs on one node do not meet
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
python=${MEGATRON_FP4_PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  if [[ -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
fi

# A sweep is one program, which calls this script for each of its runs.
for argument in "$@"; do
  if [[ $argument == -m || $argument == --multirun ]]; then
    ((nnodes == 1)) || die "--multirun on several nodes: start it once, with --launch \"COMMAND\" or a launcher of hydra's"
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    printf -v each '%q --nproc-per-node %s' "$root/launch/torchrun.sh" "$nproc_per_node"
    exec "$python" -m megatron_fp4.pretrain --launch "$each" "$@"
  fi
done

# megatron_fp4.comm.launch refuses to train when the world is another size.
export MEGATRON_FP4_EXPECTED_WORLD_SIZE=${MEGATRON_FP4_EXPECTED_WORLD_SIZE:-$((nnodes * nproc_per_node))}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # run this checkout, from whatever folder
module=${MEGATRON_FP4_MODULE:-megatron_fp4.pretrain}
# An override of pretrain has a `=`, or begins with `~`; a word alone is the name of a command.
if [[ ${1:-} =~ ^[a-z][a-z-]*$ && -z ${MEGATRON_FP4_MODULE:-} ]]; then module=megatron_fp4; fi
exec "$python" "$root/launch/supervise.py" "${rendezvous[@]}" --nproc-per-node "$nproc_per_node" \
  -m "$module" "$@"
