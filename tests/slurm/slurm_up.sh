#!/usr/bin/env bash
# slurm_up.sh FOLDER: a real SLURM of two nodes on this machine, for tests. Needs root; prints the path of slurm.conf.
#
# munged, slurmctld, and one slurmd a node. Each node has a network, a host name and a mount table of its own (node1 is
# 10.88.0.11 ...), so that links can be cut and names resolve without touching the host's files. GPUs are character devices
# that nothing drives: SLURM counts and hands them out as real ones.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$1
nodes=2
net=10.88.0
bridge=pislurm

# shellcheck source=tools/_apt.sh
source "$here/../../tools/_apt.sh"
apt_install slurmctld slurmd slurm-client munge iproute2 util-linux >&2

"$here/slurm_down.sh" "$folder"
mkdir -p "$folder"/{etc,run,log,state,dev}
chmod 755 "$folder" "$folder"/*

# Character devices of the major number for local use.
for gpu in 0 1 2 3; do mknod -m 666 "$folder/dev/gpu$gpu" c 240 "$gpu"; done

cat >"$folder/etc/slurm.conf" <<END
ClusterName=tests
SlurmctldHost=$(hostname -s)($net.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/run/munge.sock,cred_expire=12
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
ReturnToService=1
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=20
SlurmctldTimeout=10
KillWait=20
MessageTimeout=10
TCPTimeout=2
MinJobAge=86400
CompleteWait=0
NodeName=node[1-$nodes] NodeAddr=$net.[11-$((10 + nodes))] CPUs=16 RealMemory=100000 Gres=gpu:a100:4 State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF State=UP
END
printf 'AutoDetect=off\nNodeName=node[1-%d] Name=gpu Type=a100 File=%s\n' "$nodes" "$folder/dev/gpu[0-3]" >"$folder/etc/gres.conf"
printf 'CgroupPlugin=cgroup/v1\n' >"$folder/etc/cgroup.conf"
export SLURM_CONF=$folder/etc/slurm.conf

ip link add "$bridge" type bridge
ip addr add "$net.1/24" dev "$bridge"
ip link set "$bridge" up
{
    echo "127.0.0.1 localhost"
    echo "$net.1 $(hostname -s)"
    for i in $(seq "$nodes"); do echo "$net.$((10 + i)) node$i"; done
} >"$folder/etc/hosts"
# Names come from that file alone: inside a node each look-up by DNS would wait for its time-out.
sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$folder/etc/nsswitch.conf"
for i in $(seq "$nodes"); do
    ip netns add "pinode$i"
    ip link add "piveth$i" type veth peer name eth0 netns "pinode$i"
    ip link set "piveth$i" master "$bridge" up
    ip -n "pinode$i" link set lo up
    ip -n "pinode$i" addr add "$net.$((10 + i))/24" dev eth0
    ip -n "pinode$i" link set eth0 up
    ip -n "pinode$i" route add default via "$net.1"
done

(umask 077 && head -c 1024 /dev/urandom >"$folder/etc/munge.key")
munged --force --key-file="$folder/etc/munge.key" --socket="$folder/run/munge.sock" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/run/munged.seed"
slurmctld -f "$SLURM_CONF"
for i in $(seq "$nodes"); do "$here/slurm_node.sh" "$folder" "$i"; done

for _ in $(seq 200); do
    [ "$(sinfo -h -N -p normal -o '%n %T' 2>/dev/null | grep -c ' idle$')" = "$nodes" ] && break
    sleep 0.1
done
if [ "$(sinfo -h -N -p normal -o '%n %T' | grep -c ' idle$')" != "$nodes" ]; then
    tail -n 20 "$folder"/log/*.log >&2
    exit 1
fi
echo "$SLURM_CONF"
