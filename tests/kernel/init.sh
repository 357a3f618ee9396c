#!/bin/busybox sh
# The first process of the guest. The kernel hands it EXERCISE and PORTS of its command line as variables; PORTS has a
# comma between one and the next.
export PATH=/usr/sbin:/usr/bin:/bin

/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
echo "step: booted Linux $(uname -r) on $(sed -n 's/^model name.*: //p;' /proc/cpuinfo | head -n 1)"

for module in virtio_pci virtio_net nbd; do
    modprobe "$module"
done
# What qemu's user network gives to the first guest, and the address under which it reaches the host's loopback.
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up

sh "/$EXERCISE.sh" /dev/nbd0 10.0.2.2 $(echo "$PORTS" | tr , ' ') || echo "step: the exercise failed"
poweroff -f
