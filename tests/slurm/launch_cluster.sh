#!/bin/bash
# A real slurm cluster of two nodes on this one host, for tests. Needs root (slurmd starts tasks as their user).
#
#   launch_cluster.sh install       Debian packages slurm-wlm and munge, if absent; where that is impossible: a line on
#                                   stdout that says why, and exit code 3
#   launch_cluster.sh start BASE    munged, slurmctld and two slurmd; configuration, state, logs and pids under BASE
#   launch_cluster.sh stop BASE     ends exactly what `start` started, and the jobs that still run there
#
# After start: export SLURM_CONF=BASE/slurm.conf. Partitions: `debug` (default), and `high`, which preempts it.
# The node names are HOST and HOST-2: slurm.sbatch takes the first node's name as the rendezvous address, so that
# one must resolve; every machine resolves its own name.
set -euo pipefail

host=$(hostname -s)
# Waits that a busy host may need; nothing takes longer because of them where it is idle.
start_seconds=120 grace_seconds=60 kill_wait_seconds=60 message_seconds=60
cpus_per_node=2 memory_mb_per_node=4000

cannot() {
  echo "$*"
  exit 3
}

install_packages() {
  ((EUID == 0)) || cannot "slurm needs root, which starts the tasks of its users"
  getent hosts "$host" >/dev/null || cannot "the host does not resolve its own name '$host'"
  command -v slurmctld slurmd srun munged >/dev/null && return
  command -v apt-get >/dev/null || cannot "slurm is not installed, and there is no apt-get (Debian, Ubuntu) to install it"
  local apt=(timeout --kill-after=10 600 apt-get -qq -o Acquire::Retries=3 -o Acquire::http::Timeout=20
    -o DPkg::Lock::Timeout=120)
  local out
  "${apt[@]}" update >/dev/null 2>&1 || true # one source that fails may not be the one that is needed
  out=$(DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y slurm-wlm munge 2>&1) ||
    cannot "apt-get could not install slurm-wlm and munge ($(grep -m 1 '^E:' <<<"$out" || tail -n 1 <<<"$out"))"
}

free_ports() { # the first of three ports in a row to which nobody listens
  local first k
  for first in {17000..17900..10}; do
    for k in 0 1 2; do if (: <"/dev/tcp/127.0.0.1/$((first + k))") 2>/dev/null; then continue 2; fi; done
    echo "$first"
    return
  done
}

start_munge() { # a munged that runs already is used and left alone
  munge -n >/dev/null 2>&1 && return
  install -d -o munge -g munge -m 0755 /run/munge # the package leaves this to init, which may not run here
  if [[ ! -s /etc/munge/munge.key ]]; then
    (umask 077 && head -c 128 /dev/urandom >/etc/munge/munge.key && chown munge: /etc/munge/munge.key)
  fi
  runuser -u munge -- /usr/sbin/munged
  munge -n | unmunge >/dev/null
  echo "munged $(cat /run/munge/munged.pid)" >>"$base/pids"
}

write_configuration() {
  local port
  port=$(free_ports)
  cat >"$base/slurm.conf" <<CONF
ClusterName=onehost
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job may not start before its old credential has expired, by default after 120 s
AuthInfo=cred_expire=15
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
# no cgroups in a container: find processes by /proc, bind nothing
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
# the nodes are as large as written below, however few cores this host has
SlurmdParameters=config_overrides
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
JobRequeue=1
KillWait=$kill_wait_seconds
ReturnToService=2
MessageTimeout=$message_seconds
MinJobAge=600
GresTypes=gpu
JobCompType=jobcomp/none
CONF
  mkdir -p "$base/dev"
  : >"$base/gres.conf"
  local name=$host node
  for node in 1 2; do
    # stands for a GPU: a device file that behaves as /dev/null (slurm refuses a regular file)
    for k in 0 1; do [[ -c $base/dev/nvidia$k ]] || mknod -m 666 "$base/dev/nvidia$k" c 1 3; done
    echo "NodeName=$name NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=$cpus_per_node" \
      "RealMemory=$memory_mb_per_node Gres=gpu:2 State=UNKNOWN" >>"$base/slurm.conf"
    echo "NodeName=$name Name=gpu File=$base/dev/nvidia[0-1]" >>"$base/gres.conf"
    name=$host-2
  done
  local partition="Nodes=$host,$host-2 MaxTime=INFINITE State=UP OverSubscribe=NO"
  cat >>"$base/slurm.conf" <<CONF
PartitionName=debug $partition Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace_seconds
PartitionName=high $partition Default=NO PriorityTier=10 PreemptMode=OFF
CONF
}

start_daemon() { # NAME COMMAND...: in its own session, so that a Ctrl-C in the terminal does not reach it
  local name=$1
  shift
  setsid "$@" >"$base/log/$name.out" 2>&1 &
  echo "$name $!" >>"$base/pids"
}

start() {
  mkdir -p "$base"/{state,log,spool/"$host",spool/"$host-2"}
  : >"$base/pids"
  start_munge
  write_configuration
  export SLURM_CONF=$base/slurm.conf
  start_daemon slurmctld /usr/sbin/slurmctld -D -c -f "$SLURM_CONF"
  local node
  for node in "$host" "$host-2"; do start_daemon "slurmd.$node" /usr/sbin/slurmd -D -N "$node" -f "$SLURM_CONF"; done
  local end=$((SECONDS + start_seconds))
  while ((SECONDS < end)); do
    if (($(timeout 30 sinfo -h -N -p debug -o %T 2>/dev/null | grep -c idle || true) == 2)); then return; fi
    sleep 0.5
  done
  echo "launch_cluster.sh: the nodes are not idle after $start_seconds s; logs in $base/log" >&2
  exit 1
}

stop() {
  local name pid pids=()
  [[ -e $base/pids ]] || return 0
  export SLURM_CONF=$base/slurm.conf
  if [[ $(timeout 30 squeue -h 2>/dev/null) ]]; then # a failed test left a job, whose ranks would go on for ever
    timeout 30 scancel --quiet --full --signal=KILL --user="$(id -un)" || true
    timeout 30 scancel --quiet --user="$(id -un)" || true
    sleep 3
  fi
  while read -r name pid; do
    kill "$pid" 2>/dev/null && pids+=("$pid")
  done <"$base/pids"
  for _ in {1..50}; do
    local alive=0
    for pid in "${pids[@]}"; do if kill -0 "$pid" 2>/dev/null; then alive=1; fi; done
    ((alive)) || return 0
    sleep 0.2
  done
  for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
}

case ${1:-} in
  install) install_packages ;;
  start | stop)
    base=${2:?a folder for state, logs and pids}
    "$1"
    ;;
  *)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | head -n -1 >&2
    exit 2
    ;;
esac
