# shellcheck shell=bash
# What `up` and `down` share: where the cluster lives, and how to stop exactly what was started.
set -euo pipefail

DIR=${FDIFF_TESTCLUSTER_DIR:-/tmp/fdiff-testcluster}
export SLURM_CONF=$DIR/slurm.conf # every daemon and job of ours carries this in its environment
NODES=(fdiff1 fdiff2)             # unlikely names: they must not shadow a real host
DAEMONS=("slurmd-${NODES[0]}" "slurmd-${NODES[1]}" slurmctld slurmdbd mariadbd munged) # order of stopping
# A limit that Linux ignores and that neither Slurm nor jobs set, but every descendant inherits: daemons and jobs are
# known by it, whatever became of their parents, session and environment.
BRAND=$((1000000000 + $(cksum <<<"$DIR" | cut -d' ' -f1) % 1000000000))
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

ours() { # ours PID: was it started for this cluster? No pipe: under pipefail `tr | grep -q` fails where tr still writes
    grep -qszxF "SLURM_CONF=$SLURM_CONF" "/proc/$1/environ"
}

daemon_pid() { # prints the pid of a daemon of ours that lives
    local pid
    pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) && ours "$pid" && echo "$pid"
}

remains() { # prints what lives of daemons and jobs: those branded, those that name us and a job, and all below them
    local roots
    roots=$({
        grep -lsE "^Max file locks +$BRAND +$BRAND " /proc/[0-9]*/limits
        grep -lszxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | xargs -r grep -lsz '^SLURM_JOB_ID='
    } | tr -cd '0-9\n' | xargs) || true
    ps -eo pid=,ppid=,stat= | awk -v roots=" $roots " -v self="$$" '
        { parent[$1] = $2; dead[$1] = $3 ~ /^[ZX]/ }
        END { for (p in parent) { below = mine = 0
                                  for (q = p; q in parent; q = parent[q]) {
                                      if (index(roots, " " q " ")) below = 1
                                      if (q == self) mine = 1 }
                                  if (below && !mine && !dead[p]) print p } }'
}

nothing_remains() { # kills what it finds; true only once there is nothing, not even a process that is about to end
    local pids
    pids=$(remains)
    [[ -n $pids ]] || return 0
    xargs kill -KILL <<<"$pids" 2>/dev/null || true
    return 1
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
    for name in "${DAEMONS[@]}"; do stop_daemon "$name"; done
    wait_until 20 nothing_remains || die "these processes do not end: $(remains | xargs)"
    remove_hosts
}
