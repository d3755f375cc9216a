//! Detection of AMX: the processor has to have tiles, and the system has to keep their state.

use std::{
    arch::{
        asm,
        x86_64::{__cpuid, __cpuid_count},
    },
    sync::OnceLock,
};

/// Returns `true` if the processor has the instructions and the system lets this process use them.
pub(crate) fn detected() -> bool {
    static DETECTED: OnceLock<bool> = OnceLock::new();
    *DETECTED.get_or_init(|| has_instructions() && system_permits())
}

fn has_instructions() -> bool {
    const LEAF: u32 = 7;
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    if __cpuid(0).eax < LEAF || !is_x86_feature_detected!("xsave") {
        return false;
    }
    let features = __cpuid_count(LEAF, 0).edx;
    features & AMX_TILE != 0 && features & AMX_BF16 != 0
}

/// Asks Linux to keep the state of tiles; other systems are not asked.
#[cfg(target_os = "linux")]
fn system_permits() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: the call reads no memory of this process; it changes what the threads of this process may use.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn system_permits() -> bool {
    false
}
