# shellcheck shell=bash
# What `up` and `down` share: where the cluster lives, and how to stop exactly what was started.
set -euo pipefail

DIR=${FDIFF_TESTCLUSTER_DIR:-/tmp/fdiff-testcluster}
export SLURM_CONF=$DIR/slurm.conf # every daemon and job of ours carries this in its environment
NODES=(fdiff1 fdiff2)             # unlikely names: they must not shadow a real host
DAEMONS=("slurmd-${NODES[0]}" "slurmd-${NODES[1]}" slurmctld slurmdbd mariadbd munged) # order of stopping
MARK="# fdiff-testcluster $DIR"   # ends the lines that we own in /etc/hosts

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

check_caller() { # the folder is removed by `down`, so it must be ours
    [[ $EUID == 0 ]] || die "run it as root: Slurm's daemons start jobs as their users"
    [[ $DIR =~ ^/[A-Za-z0-9._/-]+$ ]] \
        || die "FDIFF_TESTCLUSTER_DIR=$DIR must be an absolute path of letters, digits and . _ - /"
    [[ ${#DIR} -le 80 ]] || die "FDIFF_TESTCLUSTER_DIR=$DIR has more than the 80 letters that leave room for a socket"
    [[ ! -e $DIR || -e $DIR/owned || -z $(ls -A "$DIR") ]] \
        || die "FDIFF_TESTCLUSTER_DIR=$DIR holds something else; name an empty or a new folder"
}

take_lock() { # one `up` or `down` at a time, whatever their folders: they share /etc/hosts and the ports
    exec 9</etc/hosts
    flock -w 120 9 || die "another up or down has held its lock on /etc/hosts for 120 s"
}

wait_until() { # wait_until SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

ours() { # ours PID: was it started for this cluster?
    { tr '\0' '\n' <"/proc/$1/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; } 2>/dev/null
}

daemon_pid() { # prints the pid of a daemon of ours that lives
    local pid
    pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) && ours "$pid" && echo "$pid"
}

job_pids() { # prints every process of our jobs: those that name us and a job, each slurmstepd and all below it
    local environ pid roots=" "
    for environ in /proc/[0-9]*/environ; do
        pid=${environ//[!0-9]/}
        ours "$pid" || continue
        if [[ $(cat "/proc/$pid/comm" 2>/dev/null) == slurmstepd ]] || grep -qsz '^SLURM_JOB_ID=' "$environ"; then
            roots+="$pid "
        fi
    done
    ps -eo pid=,ppid= | awk -v roots="$roots" '
        { parent[$1] = $2 }
        END { for (p in parent) { q = p; while (q in parent && !index(roots, " " q " ")) q = parent[q]
                                  if (index(roots, " " q " ")) print p } }'
}

kill_jobs() { # again until none is found: one may have forked while it was looked for
    local pids
    for _ in {1..20}; do
        pids=$(job_pids | grep -vx "$$") || break
        xargs kill -KILL <<<"$pids" 2>/dev/null || true
    done
}

stop_daemon() {
    local pid
    pid=$(daemon_pid "$1") || return 0
    kill "$pid" 2>/dev/null || true
    wait_until 10 eval "! ours $pid" || kill -KILL "$pid" 2>/dev/null || true
}

remove_hosts() { # rewritten in place: containers mount /etc/hosts as a single file
    local copy
    grep -qF -- "$MARK" /etc/hosts || return 0
    copy=$(mktemp)
    awk -v mark="$MARK" 'substr($0, length($0) - length(mark) + 1) != mark' /etc/hosts >"$copy"
    cat "$copy" >/etc/hosts
    rm "$copy"
}

stop_cluster() { # safe at any stage; no slurmd is left to start or requeue anything when the jobs are killed
    local name
    for name in "${DAEMONS[@]:0:3}"; do stop_daemon "$name"; done
    kill_jobs
    for name in "${DAEMONS[@]:3}"; do stop_daemon "$name"; done
    remove_hosts
}
