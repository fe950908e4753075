# shellcheck shell=bash
# Accounting for the test cluster: a MariaDB of its own and slurmdbd, so that sacct works. Sourced by `up`.

can_account() {
    local program
    for program in mariadbd mariadb mariadb-install-db slurmdbd sacctmgr; do
        command -v "$program" >/dev/null || return 1
    done
}

write_accounting_config() { # write_accounting_config PORT_OF_SLURMDBD PORT_OF_MARIADB PASSWORD
    cat >"$DIR/slurmdbd.conf" <<CONFIG
DbdHost=$(hostname -s)
DbdAddr=127.0.0.1
DbdPort=$1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$2
StorageUser=slurm
StoragePass=$3
CONFIG
    chmod 600 "$DIR/slurmdbd.conf"
}

database() { mariadb --no-defaults --socket="$DIR/db/socket" "$@" >>"$DIR/log/mariadbd.out" 2>&1; }

start_database() { # start_database PORT PASSWORD
    mariadb-install-db --no-defaults --datadir="$DIR/db" --user=root --skip-test-db --force \
        --innodb-log-file-size=4M >"$DIR/log/mariadb-install.out" 2>&1 9>&- || fail mariadb "mariadb-install-db failed"
    start mariadbd "$(command -v mariadbd)" --no-defaults --datadir="$DIR/db" --user=root --port="$1" \
        --bind-address=127.0.0.1 --socket="$DIR/db/socket" --innodb-log-file-size=4M --innodb-buffer-pool-size=32M
    wait_until 20 database -e "SELECT 1" || fail mariadb "the database did not answer in 20 s"
    database -e "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '$2'; GRANT ALL ON *.* TO slurm@'127.0.0.1'" \
        || fail mariadb "the database refused to make a user"
}

start_accounting() { # start_accounting PORT_OF_SLURMDBD PORT_OF_MARIADB; leaves the cluster registered
    local password
    password=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
    write_accounting_config "$1" "$2" "$password"
    start_database "$2" "$password"
    start slurmdbd "$(command -v slurmdbd)" -D
    wait_until 20 eval 'timeout 5 sacctmgr --noheader list cluster >/dev/null 2>&1' \
        || fail slurmdbd "slurmdbd did not answer in 20 s"
    sacctmgr --immediate add cluster fdiff >>"$DIR/log/sacctmgr.out" 2>&1 || fail sacctmgr "sacctmgr add cluster failed"
}
