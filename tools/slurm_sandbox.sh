#!/usr/bin/env bash
# A real Slurm of two nodes on this one machine, with accounting, for tests of `megatron-nsr launch`: make test-slurm.
#
#   tools/slurm_sandbox.sh up      installs Debian's packages where they are missing, and starts everything; does nothing if it runs
#   tools/slurm_sandbox.sh down    ends it and removes its directory; the packages stay
#
# Everything listens on 127.0.0.1, and lies in SLURM_SANDBOX (/tmp/megatron_nsr_slurm): munge's key and socket, the accounting database,
# configuration, spool and logs. Nothing is written to /etc, and no service of the system is used or started. Then:
#
#   export SLURM_CONF=/tmp/megatron_nsr_slurm/slurm.conf
#   sinfo
set -euo pipefail

ROOT=${SLURM_SANDBOX:-/tmp/megatron_nsr_slurm}
PACKAGES=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server)
PROGRAMS=(munged slurmctld slurmd slurmdbd mariadbd mariadb-install-db mariadb srun sacct)
NODES=(node0 node1)
CTLD_PORT=16817 DBD_PORT=16819 DATABASE_PORT=16833 FIRST_NODE_PORT=16820
CPUS_A_NODE=2
WAIT_S=60
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$ROOT/slurm.conf

main() {
    case "${1:-}" in
    up | down) ;;
    *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
    esac
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || fail "root is needed, or sudo that asks no password"
        exec sudo -n SLURM_SANDBOX="$ROOT" "$0" "$1"
    fi
    "$1"
}

up() {
    if [ -e "$ROOT/up" ] && sinfo -h -t idle,alloc,mix >/dev/null 2>&1; then
        echo "It runs already: export SLURM_CONF=$SLURM_CONF"
        return
    fi
    install_packages
    down
    install -d -m 755 "$ROOT"
    trap 'status=$?; [ $status = 0 ] || { tail -n 20 "$ROOT"/*.log >&2 || true; down; }; exit $status' EXIT
    start_munge
    start_database
    write_configuration
    start_slurm
    touch "$ROOT/up"
    echo "Two nodes are up: export SLURM_CONF=$SLURM_CONF"
}

down() {
    end_jobs
    # The reverse of the order in which they were started; each daemon by the pid that it wrote.
    local name
    for name in "slurmd-${NODES[1]}" "slurmd-${NODES[0]}" slurmctld slurmdbd mariadbd munged; do
        stop "$ROOT/$name.pid" "${name%%-*}"
    done
    rm -rf "$ROOT"
}

# Processes of jobs would outlive the daemons.
end_jobs() {
    local tries
    [ -e "$ROOT/up" ] || return 0
    squeue -h -o %A 2>/dev/null | xargs -r scancel 2>/dev/null || return 0
    for tries in $(seq 150); do
        [ -n "$(squeue -h 2>/dev/null)" ] || return 0
        sleep 0.1
    done
}

install_packages() {
    local missing=() program policy=/usr/sbin/policy-rc.d
    for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || missing+=("$program"); done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null || fail "${missing[*]} not found, and apt-get cannot install Debian's ${PACKAGES[*]} here"
    echo "Installing ${PACKAGES[*]} ..."
    apt-get update -qq >/dev/null
    # Keeps Debian's services from starting with their packages.
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" >/dev/null
    if [ -n "$(trap -p EXIT)" ]; then
        rm -f "$policy"
        trap - EXIT
    fi
}

start_munge() {
    install -d -m 755 "$ROOT/munge"
    (umask 077 && dd if=/dev/urandom of="$ROOT/munge/key" bs=1024 count=1 status=none)
    munged --force --key-file="$ROOT/munge/key" --socket="$ROOT/munge/socket" --pid-file="$ROOT/munged.pid" \
        --seed-file="$ROOT/munge/seed" --log-file="$ROOT/munged.log" --num-threads=2
}

start_database() {
    install -d -m 700 "$ROOT/database"
    PASSWORD=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    mariadb-install-db --no-defaults --user=root --datadir="$ROOT/database" --auth-root-authentication-method=socket --skip-test-db \
        >"$ROOT/mariadb-install.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$ROOT/database" --socket="$ROOT/database/socket" --pid-file="$ROOT/mariadbd.pid" \
        --bind-address=127.0.0.1 --port=$DATABASE_PORT --innodb-buffer-pool-size=64M >"$ROOT/mariadbd.log" 2>&1 </dev/null &
    wait_for "the database" mariadb --no-defaults --socket="$ROOT/database/socket" -e "select 1"
    mariadb --no-defaults --socket="$ROOT/database/socket" -e "create database slurm;
        grant all on slurm.* to slurm@'127.0.0.1' identified by '$PASSWORD'; grant all on slurm.* to slurm@localhost identified by '$PASSWORD'"
}

write_configuration() {
    local host
    host=$(hostname -s)
    install -d -m 755 "$ROOT/state" "$ROOT/spool"
    (umask 077 && cat >"$ROOT/slurmdbd.conf") <<END
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$DBD_PORT
CommunicationParameters=NoInAddrAny
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/socket
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$DATABASE_PORT
StorageLoc=slurm
StorageUser=slurm
StoragePass=$PASSWORD
LogFile=$ROOT/slurmdbd.log
PidFile=$ROOT/slurmdbd.pid
END
    cat >"$ROOT/slurm.conf" <<END
ClusterName=sandbox
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$CTLD_PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$DBD_PORT
AccountingStoragePass=$ROOT/munge/socket
MailProg=/bin/true
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/slurmctld.pid
SlurmdPidFile=$ROOT/slurmd-%n.pid
SlurmctldLogFile=$ROOT/slurmctld.log
SlurmdLogFile=$ROOT/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=600
NodeName=node[0-1] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$FIRST_NODE_PORT-$((FIRST_NODE_PORT + 1))] CPUs=$CPUS_A_NODE RealMemory=2000
PartitionName=sandbox Nodes=node[0-1] Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4 State=UP
END
}

start_slurm() {
    slurmdbd
    wait_for "slurmdbd" listening $DBD_PORT
    sacctmgr -i add cluster sandbox >/dev/null 2>&1 || true
    slurmctld
    wait_for "slurmctld" scontrol ping
    local node
    for node in "${NODES[@]}"; do
        install -d "$ROOT/spool/$node"
        slurmd -N "$node"
    done
    wait_for "two idle nodes" nodes_are_idle
}

nodes_are_idle() { [ "$(sinfo -h -t idle -o %D)" = ${#NODES[@]} ]; }

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# wait_for WHAT COMMAND...: until the command succeeds.
wait_for() {
    local what=$1 deadline=$((SECONDS + WAIT_S))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || fail "$what did not come up within $WAIT_S s"
        sleep 0.2
    done
}

# stop PIDFILE PROGRAM: asks the process to end, and kills it after ten seconds.
stop() {
    local pid tries
    pid=$(cat "$1" 2>/dev/null) || return 0
    # After a restart of the machine the number may be somebody else's.
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] || return 0
    kill -TERM "$pid" 2>/dev/null || return 0
    for tries in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

fail() {
    echo "slurm_sandbox: $*" >&2
    exit 1
}

main "$@"
