#!/bin/bash
# The first process of the user-mode kernel: sets up its files and network, runs the command, ends the kernel.
#
# uml.py passes $talk, a folder of the host. There, request is this script's input, variables in bash's notation:
# directory, shares, environment and command; cpuinfo is the host's, of one processor; status is this script's output.
# The first two serial lines are the command's output.
set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
trap 'echo "guest.sh: line $LINENO failed" >/dev/console' ERR

# ---- Files: the host's read-only root, below a layer in memory that takes whatever is written

mount -n -t proc proc /proc
mount -n -t tmpfs layer /mnt
mkdir /mnt/written /mnt/work /mnt/host /mnt/root
mount -n -t hostfs host /mnt/host
host=/mnt/host root=/mnt/root
mount -n -t overlay -o lowerdir=/,upperdir=/mnt/written,workdir=/mnt/work overlay $root
mount -n -t proc proc $root/proc
mount -n -t sysfs sys $root/sys
mount -n -t devtmpfs dev $root/dev
mkdir -p $root/dev/pts $root/dev/shm
mount -n -t devpts pts $root/dev/pts
mount -n -t tmpfs shm $root/dev/shm
mount -n -t tmpfs run $root/run

source "$host$talk/request"
for share in "${shares[@]}"; do
    mount -n --bind "$host$share" "$root$share"
done

# The host's, which names the processor's model and frequency; perftest computes with the latter.
mount -n --bind "$host$talk/cpuinfo" $root/proc/cpuinfo

# Of Debian's Python packages, pyverbs and no other may be seen.
mkdir -p $root/run/lamina/python
ln -s /usr/lib/python3/dist-packages/pyverbs $root/run/lamina/python/

# This kernel breaks when the end of a process unmaps an io_uring, which uvloop makes where it can.
echo 2 >/proc/sys/kernel/io_uring_disabled

# ---- Network: two ends of a cable, and an RDMA device on each

# The kernel would deliver packets between its own addresses without any device. Hence routes by sender, asked before
# the table of local addresses.
echo lamina >/proc/sys/kernel/hostname
ip link set lo up
ip link add veth0 type veth peer name veth1
for end in 0 1; do
    near=10.77.0.$((end + 1)) far=10.77.0.$((2 - end))
    ip address add $near/24 dev veth$end
    ip link set veth$end address 02:00:00:00:00:0$end mtu 4200 up
    # Known for ever: else a lossy cable would lose the questions for addresses, and hold back packets for seconds.
    ip neighbour add $far lladdr 02:00:00:00:00:0$((1 - end)) dev veth$end nud permanent
    echo 1 >/proc/sys/net/ipv4/conf/veth$end/accept_local
    ip rule add pref 10 iif lo from $near to $far lookup $((100 + end))
done
ip route add 10.77.0.2 dev veth0 src 10.77.0.1 table 100
ip route add 10.77.0.1 dev veth1 src 10.77.0.2 table 101
ip rule add pref 20 lookup local
ip rule del pref 0
for end in 0 1; do
    rdma link add rxe$end type rxe netdev veth$end
done

# ---- The command, with pipes for its output so that it sees no terminal

exec 3>$root/dev/ttyS0 4>$root/dev/ttyS1
stty raw -echo <&3
stty raw -echo <&4
mkfifo /mnt/stdout /mnt/stderr
cat </mnt/stdout >&3 & stdout=$!
cat </mnt/stderr >&4 & stderr=$!

ulimit -n 65536 -l unlimited
status=0
chroot $root env -i --chdir="$directory" "${environment[@]}" "${command[@]}" \
    </dev/null >/mnt/stdout 2>/mnt/stderr 3>&- 4>&- || status=$?

# What the command left running could hold its output open for ever.
for process in /proc/[0-9]*; do
    case ${process#/proc/} in
        1 | "$stdout" | "$stderr") ;;
        *) kill -KILL "${process#/proc/}" 2>/dev/null || true ;;
    esac
done
wait "$stdout" "$stderr"
exec 3>&- 4>&-
echo $status >"$host$talk/status"
# reboot(2) with RB_POWER_OFF, by what every Debian has
perl -e 'syscall(169, 0xfee1dead, 0x28121969, 0x4321fedc)'
