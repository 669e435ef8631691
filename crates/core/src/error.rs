//! The one error type of the library.
//!
//! An error keeps the operation, the backend it came from and the platform's raw code, and its text says what the user
//! can do about it. It never swallows a code and never guesses a cause that the platform did not report.

use crate::accel::AccelKind;
use std::fmt;

/// What every operation of this library returns.
pub type VcpuResult<T> = Result<T, AccelError>;

/// Everything that can go wrong between a VMM and its accelerator.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccelError {
    /// The backend cannot be used on this host (or not by this user); the reason says why and what helps.
    #[error("{kind} is not available: {reason}")]
    Unavailable {
        /// The backend that was asked for.
        kind: AccelKind,
        /// Why it cannot be used.
        reason: UnavailableReason,
    },
    /// The backend, or this version of the host, does not offer the operation.
    #[error("{what} is not supported by {}", KindName(*kind))]
    Unsupported {
        /// The backend, if the object knows it (a user's own [`VcpuOps`](crate::VcpuOps) may not).
        kind: Option<AccelKind>,
        /// The operation or feature that was asked for.
        what: &'static str,
    },
    /// An argument is outside what the call accepts. Nothing was changed.
    #[error("invalid {what}: {detail}")]
    InvalidArgument {
        /// The argument.
        what: &'static str,
        /// Its value and the rule that it breaks.
        detail: String,
    },
    /// The call must come from the thread that the vCPU is bound to (HVF binds at first use).
    #[error("{op} called on the wrong thread: this vCPU belongs to the thread that first used it")]
    WrongThread {
        /// The call.
        op: &'static str,
    },
    /// `run()` was called while the guest still waits for the answer to a read.
    #[error("the guest waits for {len} bytes of a read at {addr:#x}; call complete_read before run")]
    PendingRead {
        /// Port number or guest physical address of the read.
        addr: u64,
        /// Bytes that [`complete_read`](crate::VcpuOps::complete_read) must supply.
        len: usize,
    },
    /// The platform refused an operation.
    #[error("{kind}: {op} failed: {code}")]
    Backend {
        /// The backend.
        kind: AccelKind,
        /// The platform's name of the operation (`KVM_SET_SREGS`, `WHvMapGpaRange`, …).
        op: &'static str,
        /// What the platform answered.
        code: RawCode,
    },
    /// A list of MSRs was processed up to, not including, `index`; the ones before took effect.
    #[error("{kind}: {op} stopped at MSR {index:#x}, after {done} that succeeded")]
    Msr {
        /// The backend.
        kind: AccelKind,
        /// `get_msrs` or `set_msrs`.
        op: &'static str,
        /// The MSR that was refused.
        index: u32,
        /// How many entries of the list were processed.
        done: usize,
    },
    /// The hardware refused to enter the guest: the vCPU's state is not one that a CPU can have.
    #[error("{kind}: the CPU refused to enter the guest (hardware reason {reason:#x}): its register state is invalid")]
    EntryFailed {
        /// The backend.
        kind: AccelKind,
        /// The platform's raw reason (VMX exit reason, SVM exit code, HRESULT).
        reason: u64,
    },
    /// The platform met an instruction that it can neither execute nor emulate.
    #[error("{kind}: cannot execute the guest instruction at {pc:#x} (bytes: {instruction}; internal error {code})")]
    Emulation {
        /// The backend.
        kind: AccelKind,
        /// The platform's sub-error (`KVM_INTERNAL_ERROR_*`).
        code: u32,
        /// Program counter, if the platform reported it.
        pc: u64,
        /// The instruction bytes, as many as were reported.
        instruction: InstructionBytes,
    },
    /// The guest touched memory that the host could not provide (removed file, guest_memfd conversion, poisoned page).
    #[error("{kind}: the host could not provide guest memory at {gpa:#x} ({size} bytes, flags {flags:#x})")]
    MemoryFault {
        /// The backend.
        kind: AccelKind,
        /// First guest physical address of the range; 0 if the platform did not say.
        gpa: u64,
        /// Bytes in the range; 0 if the platform did not say.
        size: u64,
        /// The platform's flags.
        flags: u64,
    },
    /// The host's operating system refused something that is not the hypervisor's (mapping memory, a file, a thread), or that
    /// concerns a machine as a whole ([`WholeVm`](crate::WholeVm)).
    #[error("{op} failed: {message}")]
    Host {
        /// The operation.
        op: &'static str,
        /// The operating system's text.
        message: String,
        /// The operating system's code, if there is one.
        code: Option<i32>,
    },
}

impl AccelError {
    /// An [`AccelError::InvalidArgument`]; `detail` states the value and the rule that it breaks.
    pub fn invalid(what: &'static str, detail: impl Into<String>) -> Self {
        Self::InvalidArgument { what, detail: detail.into() }
    }

    /// An [`AccelError::Host`] from the operating system's error.
    pub fn host(op: &'static str, error: &std::io::Error) -> Self {
        Self::Host { op, message: error.to_string(), code: error.raw_os_error() }
    }

    /// True if the operation or the whole backend is just not there, so that a caller may try another way.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Unsupported { .. })
    }
}

/// Prints the backend of an [`AccelError::Unsupported`].
struct KindName(Option<AccelKind>);

impl fmt::Display for KindName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(kind) => kind.fmt(f),
            None => f.write_str("this backend"),
        }
    }
}

/// A platform's own error code, unchanged.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawCode {
    /// A Unix `errno`.
    Errno(i32),
    /// A Windows `HRESULT`.
    Hresult(i32),
    /// An `hv_return_t` of macOS' Hypervisor.framework.
    HvReturn(i32),
}

impl fmt::Display for RawCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Errno(code) => std::io::Error::from_raw_os_error(*code).fmt(f),
            Self::Hresult(code) => write!(f, "HRESULT {code:#010x}"),
            Self::HvReturn(code) => write!(f, "hv_return_t {code:#010x}"),
        }
    }
}

/// Up to 15 bytes of an instruction, as the platform reported them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InstructionBytes {
    len: u8,
    bytes: [u8; 15],
}

impl InstructionBytes {
    /// Keeps the first 15 of `bytes`: no x86 instruction is longer (Intel SDM vol. 2, 2.3.11).
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        let mut kept = Self::default();
        let len = bytes.len().min(kept.bytes.len());
        kept.bytes[..len].copy_from_slice(&bytes[..len]);
        kept.len = len as u8;
        kept
    }

    /// The bytes; empty if the platform did not report any.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl fmt::Display for InstructionBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.len == 0 {
            return f.write_str("not reported");
        }
        for (i, byte) in self.as_slice().iter().enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

/// Why a backend cannot be used here. The text says what the user can do.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnavailableReason {
    /// The platform belongs to another operating system.
    #[error("it exists only on {needs}")]
    WrongOs {
        /// The operating system that has it.
        needs: &'static str,
    },
    /// The platform exists on this operating system, but not for this CPU architecture.
    #[error("it does not exist for this host's architecture ({arch})")]
    WrongArch {
        /// The host's architecture.
        arch: &'static str,
    },
    /// The device node is not there.
    #[error(
        "{path} does not exist; load the kernel module (modprobe kvm_intel or kvm_amd) or enable virtualization in the firmware or the outer hypervisor"
    )]
    NoDevice {
        /// The device node.
        path: &'static str,
    },
    /// The device node is there, but this user may not open it.
    #[error("cannot open {path}: permission denied; {}", GroupHint(group.as_deref()))]
    PermissionDenied {
        /// The device node.
        path: &'static str,
        /// The group that owns it, if it has a name.
        group: Option<String>,
    },
    /// The kernel speaks another version of the interface.
    #[error("it speaks interface version {found}, this library needs {needed}")]
    ApiVersion {
        /// The version that was found.
        found: i32,
        /// The version that is needed.
        needed: i32,
    },
    /// A dynamic library is absent.
    #[error("{library} cannot be loaded; {hint}")]
    LibraryMissing {
        /// File name of the library.
        library: &'static str,
        /// What the user can do.
        hint: &'static str,
    },
    /// The library is there, but too old.
    #[error("{library} lacks the function {function}; the operating system is too old")]
    FunctionMissing {
        /// File name of the library.
        library: &'static str,
        /// The function.
        function: &'static str,
    },
    /// The platform is installed, but switched off.
    #[error("it is switched off; {hint}")]
    FeatureOff {
        /// What the user can do.
        hint: &'static str,
    },
    /// The platform has one virtual machine per process, and there is one.
    #[error(
        "this process has a virtual machine on it already (the platform allows one), or a vCPU of the last one waits for its thread to end"
    )]
    InUse,
    /// The executable is not signed with the entitlement that the platform asks for.
    #[error("the executable lacks the entitlement {entitlement}; sign it with codesign --entitlements")]
    EntitlementMissing {
        /// The entitlement's name.
        entitlement: &'static str,
    },
    /// The hardware lacks something that the platform or this library needs.
    #[error("the hardware does not support it: {detail}")]
    UnsupportedHardware {
        /// What is lacking.
        detail: String,
    },
    /// This version of the library has no code for it yet.
    #[error("this version of vm-accel does not implement it yet")]
    NotImplemented,
    /// A call that the probe makes failed otherwise.
    #[error("{op} failed: {code}")]
    Failed {
        /// The platform's name of the operation.
        op: &'static str,
        /// What the platform answered.
        code: RawCode,
    },
}

/// Prints what to do about a missing permission.
struct GroupHint<'a>(Option<&'a str>);

impl fmt::Display for GroupHint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some("root") | None => f.write_str("its owner must grant this user access"),
            Some(group) => write!(f, "add your user to group {group} (usermod -aG {group} USER) and log in again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permission_text_names_the_group() {
        let error = AccelError::Unavailable {
            kind: AccelKind::Kvm,
            reason: UnavailableReason::PermissionDenied { path: "/dev/kvm", group: Some("kvm".into()) },
        };
        let text = error.to_string();
        assert!(text.contains("/dev/kvm") && text.contains("group kvm"), "{text}");
        assert!(error.is_absent());
    }

    #[test]
    fn instruction_bytes_keep_at_most_fifteen() {
        assert_eq!(InstructionBytes::new(&[0x90; 40]).as_slice(), &[0x90; 15]);
        assert_eq!(InstructionBytes::new(&[0x0f, 0xb8]).to_string(), "0f b8");
        assert_eq!(InstructionBytes::new(&[]).to_string(), "not reported");
    }
}
