//! How a ring is made: its flags, what the kernel must be able to do, and what it is then denied.

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{IoUring, Parameters, opcode};

use crate::cause::Host;
use crate::error::{SetupError, Step, errno_of};

/// The size of a ring, and whether it is locked down.
///
/// Memory: the kernel makes all of a ring resident when it is mapped: 68 B per submission entry, 16 B
/// per completion entry, and we keep a time of 16 B per submission entry. The default adds up to 88 KiB
/// (measured: 92 KiB more RSS), 64 and 512 entries to 16 KiB. Nearly all of it are completion
/// entries, so these should follow the number of clients and nothing more: the whole server has
/// 3 MiB. Kernels that count ring memory against RLIMIT_MEMLOCK add up all rings of a user, unless
/// the process has CAP_IPC_LOCK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Submission entries, rounded up to a power of two; 1 to 32 768. When they are all taken the
    /// driver submits early, which costs a system call and loses nothing: one batch of a round fits
    /// in 256, while arming thousands of bells at once is rare and may take several calls.
    pub entries: u32,
    /// Completion entries, rounded up to a power of two; at least `entries`. Twice the operations
    /// that can be in flight keeps the kernel from having to keep completions aside (F36): nothing
    /// is lost when it does, but each then costs it an allocation. 4096 serve 2000 connections.
    pub completion_entries: u32,
    /// Lets the ring refuse every operation but those of [`Driver`](crate::Driver), for good. Costs
    /// about 5 ns per operation; what it buys: a bug that corrupts an entry cannot open or write files.
    pub restrict: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { entries: 256, completion_entries: 4096, restrict: true }
    }
}

/// Makes a ring whose single issuer is the calling thread, checked and ready.
///
/// `DEFER_TASKRUN`: without it a waker pays 12 µs while the owner is busy in user mode.
/// `TASKRUN_FLAG`: with it a polling owner can see that an enter would yield something.
/// `SUBMIT_ALL`: one refused entry must not hold back those behind it.
/// No `SQPOLL`: it burns a core.
pub(crate) fn ring(options: &Options) -> Result<IoUring, SetupError> {
    let mut builder = IoUring::builder();
    builder
        .dontfork()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_clamp()
        .setup_cqsize(options.completion_entries);
    if options.restrict {
        builder.setup_r_disabled();
    }
    let ring = builder.build(options.entries).map_err(|error| refused(Step::CreateRing, &error))?;
    require_features(ring.params())?;
    if options.restrict {
        let submitter = ring.submitter();
        submitter
            .register_restrictions(&mut allowed())
            .and_then(|()| submitter.register_enable_rings())
            .map_err(|error| refused(Step::RestrictRing, &error))?;
    }
    Ok(ring)
}

fn refused(step: Step, error: &std::io::Error) -> SetupError {
    SetupError::refused(step, errno_of(error), Host::read())
}

/// IORING_REGISTER_BUFFERS2 and IORING_REGISTER_BUFFERS_UPDATE, which the crate keeps to itself.
const REGISTER_BUFFERS2: u8 = 15;
const REGISTER_BUFFERS_UPDATE: u8 = 16;

/// The operations that `ring.rs` can build, the one flag it sets, and the registrations it asks for.
fn allowed() -> [Restriction; 11] {
    [
        Restriction::register_op(REGISTER_BUFFERS2),
        Restriction::register_op(REGISTER_BUFFERS_UPDATE),
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::ReadFixed::CODE),
        Restriction::sqe_op(opcode::FutexWait::CODE),
        Restriction::sqe_op(opcode::FutexWake::CODE),
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_op(opcode::Timeout::CODE),
        Restriction::sqe_op(opcode::AsyncCancel::CODE),
        Restriction::sqe_op(opcode::MsgRingData::CODE),
        Restriction::sqe_flags_allowed(Flags::SKIP_SUCCESS.bits()),
    ]
}

fn require_features(params: &Parameters) -> Result<(), SetupError> {
    let required = [
        ("NODROP", params.is_feature_nodrop()), // a full completion queue loses nothing
        ("EXT_ARG", params.is_feature_ext_arg()), // the timeout of an enter
        ("SUBMIT_STABLE", params.is_feature_submit_stable()), // what an entry points to is read once
        ("CQE_SKIP", params.is_feature_skip_cqe_on_success()), // wakes without a completion
    ];
    match required.into_iter().find(|(_, present)| !present) {
        Some((feature, _)) => Err(SetupError::Feature { feature, release: Host::read().release }),
        None => Ok(()),
    }
}
