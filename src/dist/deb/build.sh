#!/bin/bash
# Builds a Debian package: build.sh ROOT VERSION FOLDER, where ROOT holds what `make install` has put below ROOT/usr. Prints the
# path of the package. COMPRESSION is one of dpkg-deb's.
set -euo pipefail
root=$1 version=$2 folder=$3
sources=$(dirname "$0")
architecture=$(dpkg --print-architecture)
# The newest interface of the C library that the program uses.
libc=$(grep -aoE 'GLIBC_2\.[0-9]+' "$root/usr/bin/flexnbd" | sort -uV | tail -1)

umask 022
mkdir -p "$root/DEBIAN" "$root/etc/flexnbd" "$root/usr/share/doc/flexnbd"
cp "$sources/../../../LICENSE" "$root/usr/share/doc/flexnbd/copyright"
install -m 755 "$sources"/{postinst,prerm,postrm} "$root/DEBIAN/"
cat >"$root/DEBIAN/control" <<END
Package: flexnbd
Version: $version
Architecture: $architecture
Maintainer: flexnbd <root@localhost>
Installed-Size: $(du -sk --exclude=DEBIAN "$root" | cut -f1)
Depends: libc6 (>= ${libc#GLIBC_}), libgcc-s1
Suggests: systemd
Section: net
Priority: optional
Description: NBD server with live migration
 It serves a disk image over the network as a block device, and moves the
 image to another machine while its clients go on using it.
END
package=$folder/flexnbd_${version}_$architecture.deb
dpkg-deb -Z"${COMPRESSION:-xz}" --root-owner-group --build "$root" "$package" >/dev/null
echo "$package"
