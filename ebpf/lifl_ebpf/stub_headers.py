"""A header tree just large enough for BCC to compile the router with, so that no kernel headers are needed.

BCC insists on a kernel source tree (`BCC_KERNEL_SOURCE`) but brings its own full `bpf.h`; of the tree it reads
these ten files, and the router needs only the integer types in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_TYPES: Final = """
#ifndef LIFL_TYPES_H
#define LIFL_TYPES_H
typedef signed char __s8;
typedef unsigned char __u8;
typedef short __s16;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __s8 s8;
typedef __u8 u8;
typedef __s16 s16;
typedef __u16 u16;
typedef __s32 s32;
typedef __u32 u32;
typedef __s64 s64;
typedef __u64 u64;
typedef __s8 int8_t;
typedef __u8 uint8_t;
typedef __s16 int16_t;
typedef __u16 uint16_t;
typedef __s32 int32_t;
typedef __u32 uint32_t;
typedef __s64 int64_t;
typedef __u64 uint64_t;
typedef __u16 __le16;
typedef __u16 __be16;
typedef __u32 __le32;
typedef __u32 __be32;
typedef __u64 __le64;
typedef __u64 __be64;
typedef __u16 __sum16;
typedef __u32 __wsum;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;
typedef long ssize_t;
typedef int pid_t;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)
#define __always_inline inline __attribute__((always_inline))
#define __aligned_u64 __u64 __attribute__((aligned(8)))
#endif
"""

_BPF_COMMON: Final = """
#ifndef _UAPI__LINUX_BPF_COMMON_H__
#define _UAPI__LINUX_BPF_COMMON_H__
#define BPF_CLASS(code) ((code) & 0x07)
#ifndef BPF_MAXINSNS
#define BPF_MAXINSNS 4096
#endif
#endif
"""

_VERSION: Final = """
#define LINUX_VERSION_CODE 0
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
"""

_FILES: Final = {
    "include/linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
    "include/linux/types.h": _TYPES,
    "include/linux/bpf_common.h": "#include <uapi/linux/bpf_common.h>\n",
    "include/linux/version.h": _VERSION,
    "include/linux/log2.h": "",
    "include/asm/page.h": "#define PAGE_SIZE 4096\n",
    "include/uapi/linux/bpf.h": "#include <linux/types.h>\n",
    "include/uapi/linux/bpf_common.h": _BPF_COMMON,
    "include/uapi/linux/if_ether.h": "",
    "include/uapi/linux/if_packet.h": "",
}


def write_stub_headers(directory: Path) -> None:
    """Write the tree into `directory`. Raises `OSError`."""
    for name, text in _FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
