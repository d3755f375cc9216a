//! The instructions of AMX for tests on processors without them: the handler of the signal that an unknown instruction
//! raises decodes it, does what the manual says, and goes on after it (Intel 64 and IA-32 Architectures Software
//! Developer's Manual, volume 2, "TDPBF16PS", "TILELOADD" and their kin).

use std::{
    cell::RefCell,
    sync::{Once, atomic::Ordering},
};

use crate::{device::Level, gemm::kernels::amx::EMULATED};

/// Emulates the instructions from now on, in the whole process, unless the processor has them.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if Level::detected() >= Level::Amx {
            // Also at a lower level that `XT_CPU` names.
            return EMULATED.store(true, Ordering::Release);
        }
        // SAFETY: the structure is plain data, for which zeros are valid; the handler has the signature that the flag
        // asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigemptyset(&mut action.sa_mask);
            assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0, "no handler");
        }
        EMULATED.store(true, Ordering::Release);
    });
}

/// Rows of 64 bytes and their number; what lies outside of its shape is zero.
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    bytes_of_row: usize,
    data: [[u8; 64]; 16],
}

const EMPTY: Tile = Tile { rows: 0, bytes_of_row: 0, data: [[0; 64]; 16] };

thread_local! {
    /// The tile registers of this thread; `None` before a configuration and after a release.
    static TILES: RefCell<Option<[Tile; 8]>> = const { RefCell::new(None) };
}

/// Places of the registers in a signal's context on Linux, by their encoding from 0 to 15.
const REGISTERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn handle(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system hands over a context of this type, alone for this handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: the processor has just read an instruction there; twelve more bytes belong to the function around it.
    let code: [u8; 12] = unsafe { at.cast::<[u8; 12]>().read() };
    let length = TILES.with(|tiles| execute(&code, registers, &mut tiles.borrow_mut()));
    let Some(length) = length else {
        // Not ours: as if there were no handler.
        // SAFETY: the default action may be set at any time.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
        return;
    };
    registers[libc::REG_RIP as usize] += length as i64;
}

/// Executes the instruction; returns its length, or `None` for an unknown one or one that would fault.
fn execute(code: &[u8; 12], registers: &[i64; 23], tiles: &mut Option<[Tile; 8]>) -> Option<usize> {
    let &[0xC4, map, second, opcode, operands, ..] = code else { return None };
    // The second map of opcodes, 128 bits, W = 0.
    if map & 0x1F != 2 || second & 0x84 != 0 {
        return None;
    }
    let prefix = second & 3;
    let (mode, register, low) = (operands >> 6, (operands >> 3 & 7) as usize, (operands & 7) as usize);
    let third = (!(second >> 3) & 15) as usize;
    match (opcode, prefix, mode) {
        (0x49, 0, 3) if operands == 0xC0 => {
            *tiles = None;
            Some(5)
        }
        (0x49, 0, _) => {
            let (address, _, length) = memory(code, registers)?;
            // SAFETY: the program says that 64 bytes can be read there.
            let shapes = unsafe { (address as *const [u8; 64]).read_unaligned() };
            *tiles = Some(configured(&shapes)?);
            Some(length)
        }
        (0x49, 3, 3) => {
            let tile = tiles.as_mut()?.get_mut(register).filter(|tile| tile.rows > 0)?;
            tile.data = [[0; 64]; 16];
            Some(5)
        }
        (0x4B, 3, 0..=2) => {
            let (address, stride, length) = memory(code, registers)?;
            let tile = tiles.as_mut()?.get_mut(register).filter(|tile| tile.rows > 0)?;
            tile.data = [[0; 64]; 16];
            for row in 0..tile.rows {
                let from = address.wrapping_add(stride.wrapping_mul(row)) as *const u8;
                // SAFETY: the program says that the rows can be read there.
                unsafe { from.copy_to_nonoverlapping(tile.data[row].as_mut_ptr(), tile.bytes_of_row) };
            }
            Some(length)
        }
        (0x4B, 2, 0..=2) => {
            let (address, stride, length) = memory(code, registers)?;
            let tile = tiles.as_ref()?.get(register).filter(|tile| tile.rows > 0)?;
            for row in 0..tile.rows {
                let to = address.wrapping_add(stride.wrapping_mul(row)) as *mut u8;
                // SAFETY: the program says that the rows can be written there.
                unsafe { to.copy_from_nonoverlapping(tile.data[row].as_ptr(), tile.bytes_of_row) };
            }
            Some(length)
        }
        (0x5C, 2, 3) => {
            let tiles = tiles.as_mut()?;
            let (a, b) = (*tiles.get(low)?, *tiles.get(third)?);
            let sums = tiles.get_mut(register)?;
            let fits = sums.rows == a.rows
                && sums.bytes_of_row == b.bytes_of_row
                && a.bytes_of_row == 4 * b.rows
                && sums.rows * b.rows > 0;
            fits.then(|| multiply(sums, &a, &b))?;
            Some(5)
        }
        _ => None,
    }
}

/// Returns the operand in memory: its address, the stride of a tile, and the length of the instruction.
fn memory(code: &[u8; 12], registers: &[i64; 23]) -> Option<(usize, usize, usize)> {
    let (map, operands) = (code[1], code[4]);
    let value = |index: usize| registers[REGISTERS[index] as usize] as usize;
    // The prefix holds the highest bits of the registers' numbers, inverted.
    let high = |bit: u8| if map & bit == 0 { 8 } else { 0 };
    let (mode, low) = (operands >> 6, (operands & 7) as usize);
    let (base, stride, mut length) = if low == 4 {
        let sib = code[5];
        let (index, base) = ((sib >> 3 & 7) as usize + high(0x40), (sib & 7) as usize + high(0x20));
        if sib & 7 == 5 && mode == 0 {
            return None;
        }
        let stride = if index == 4 { 0 } else { value(index) << (sib >> 6) };
        (value(base), stride, 6)
    } else if low == 5 && mode == 0 {
        return None;
    } else {
        (value(low + high(0x20)), 0, 5)
    };
    let displacement = match mode {
        0 => 0,
        1 => {
            length += 1;
            code[length - 1] as i8 as isize
        }
        _ => {
            length += 4;
            i32::from_le_bytes(code[length - 4..length].try_into().ok()?) as isize
        }
    };
    Some((base.wrapping_add_signed(displacement), stride, length))
}

/// Returns empty tiles with the shapes of a configuration.
fn configured(shapes: &[u8; 64]) -> Option<[Tile; 8]> {
    let mut tiles = [EMPTY; 8];
    if shapes[0] != 1 || shapes[2..16].iter().any(|&byte| byte != 0) {
        return None;
    }
    for (index, tile) in tiles.iter_mut().enumerate() {
        let bytes_of_row = u16::from_le_bytes([shapes[16 + 2 * index], shapes[17 + 2 * index]]) as usize;
        let rows = shapes[48 + index] as usize;
        if rows > 16 || bytes_of_row > 64 || (rows == 0) != (bytes_of_row == 0) {
            return None;
        }
        (tile.rows, tile.bytes_of_row) = (rows, bytes_of_row);
    }
    Some(tiles)
}

/// Computes `sums += A·B` over pairs, the even and the odd products summed apart; numbers below the normal range are
/// zero.
fn multiply(sums: &mut Tile, a: &Tile, b: &Tile) {
    let normal = |x: f32| if x.is_subnormal() { 0.0 } else { x };
    let half = |row: &[u8; 64], index: usize| {
        normal(f32::from_bits(u32::from(u16::from_le_bytes([row[2 * index], row[2 * index + 1]])) << 16))
    };
    for row in 0..sums.rows {
        for column in 0..sums.bytes_of_row / 4 {
            let mut products = [0f32; 2];
            for pair in 0..b.rows {
                for (side, product) in products.iter_mut().enumerate() {
                    let (x, y) = (half(&a.data[row], 2 * pair + side), half(&b.data[pair], 2 * column + side));
                    *product = normal(x.mul_add(y, *product));
                }
            }
            let place = &mut sums.data[row][4 * column..4 * column + 4];
            let before = normal(f32::from_le_bytes([place[0], place[1], place[2], place[3]]));
            let sum = normal(before + normal(products[0] + products[1]));
            place.copy_from_slice(&sum.to_le_bytes());
        }
    }
}
