#!/usr/bin/env bash
# Makes FOLDER/python, an emulated aarch64 machine's Python with this tree's wheel: `prepare.sh FOLDER PYTHON [CPU]`.
# Debian's packages and the registry's aarch64 wheels are unpacked in FOLDER; nothing is installed on this machine.
set -euo pipefail
mkdir -p "$1"
folder=$(realpath "$1")
python=$(realpath --no-symlinks "$2")
cpu=${3:-neoverse-n1}
root=$folder/root # what lies under / there
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case $cpu in
neoverse-n1) part=0xd0c extensions="asimdrdm asimddp" ;; # Graviton 2; it adds up 4 products of 8 bits at once
cortex-a72) part=0xd08 extensions= ;;                    # Raspberry Pi 4; it does not
*)
    echo "$0: CPU is $cpu: name neoverse-n1 or cortex-a72" >&2
    exit 1
    ;;
esac

if [[ ! -x $folder/qemu ]]; then
    if ! command -v apt-get >/dev/null; then
        echo "$0: there is no apt-get here: run this on Debian, whose packages it takes" >&2
        exit 1
    fi
    apt=$folder/apt # of its own, so that apt resolves for a machine without a single package, and needs no root
    mkdir -p "$apt"/{lists,cache/archives}/partial
    touch "$apt/status"
    cat >"$apt/conf" <<END
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Architectures { "$(dpkg --print-architecture)"; "arm64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
END
    apt-get -qq -c "$apt/conf" update
    apt-get -qq -c "$apt/conf" install --yes --download-only python3:arm64 libstdc++6:arm64 qemu-user-static
    for package in "$apt"/cache/archives/*_arm64.deb; do
        dpkg-deb -x "$package" "$root"
    done
    dpkg-deb --fsys-tarfile "$apt"/cache/archives/qemu-user-static_*.deb |
        tar -xO ./usr/bin/qemu-aarch64-static >"$folder/qemu.new"
    chmod +x "$folder/qemu.new"
    mv "$folder/qemu.new" "$folder/qemu"
    rm -r "$apt"
fi

# ONNX Runtime reads which instructions the CPU has, and dies without these files.
mkdir -p "$root"/{proc,sys/devices/system/cpu}
for number in 0 1; do
    printf '%s\n' "processor : $number" "Features : fp asimd aes pmull sha1 sha2 crc32 $extensions" \
        "CPU implementer : 0x41" "CPU architecture : 8" "CPU variant : 0x0" "CPU part : $part" "CPU revision : 1" ""
done >"$root/proc/cpuinfo"
echo 0-1 | tee "$root"/sys/devices/system/cpu/{possible,present,online} >/dev/null

version=$(basename "$(readlink "$root/usr/bin/python3")")
cat >"$folder/python" <<END
#!/bin/sh
exec "$folder/qemu" -cpu $cpu -L "$root" "$root/usr/bin/$version" -I "\$@"
END
chmod +x "$folder/python"

platforms=(--platform manylinux2014_aarch64)
for minor in {17..36}; do # of glibc; Debian 12 has 2.36
    platforms+=(--platform "manylinux_2_${minor}_aarch64")
done
site=$root/usr/lib/python3/dist-packages
rm -rf "$folder/wheel" "$site"
"$python" -m build --wheel --no-isolation --outdir "$folder/wheel" . &>"$folder/build.log" || {
    cat "$folder/build.log" >&2
    exit 1
}
"$python" -m pip install --quiet --no-compile --target "$site" --python-version "${version#python}" "${platforms[@]}" \
    --only-binary=:all: --constraint constraints.txt "mmemb-deploy[cpu] @ file://$(echo "$folder"/wheel/*.whl)"
