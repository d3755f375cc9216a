//! Floats of eight bits, each decoded to the f32 that has its value.

/// Decodes a float of `mantissa` explicit bits whose largest exponent is an ordinary one: a finite value, except where
/// the caller says otherwise.
fn finite(byte: u8, mantissa: u32, bias: i32) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((byte & 0x7F) >> mantissa);
    let fraction = f32::from(byte & ((1 << mantissa) - 1)) / (1u32 << mantissa) as f32;
    // Below the least exponent there is no leading one.
    let (lead, exponent) = if exponent == 0 { (0.0, 1 - bias) } else { (1.0, exponent - bias) };
    sign * (lead + fraction) * power_of_two(exponent)
}

/// `2^exponent`, from the least normal f32 on.
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// `float8_e4m3fn`: no infinity, NaN at the top.
pub(super) fn e4m3(byte: u8) -> f32 {
    if byte & 0x7F == 0x7F { f32::NAN } else { finite(byte, 3, 7) }
}

/// `float8_e5m2`: infinity and NaN as IEEE has them.
pub(super) fn e5m2(byte: u8) -> f32 {
    match byte & 0x7F {
        0x7C if byte & 0x80 == 0 => f32::INFINITY,
        0x7C => f32::NEG_INFINITY,
        0x7D..=0x7F => f32::NAN,
        _ => finite(byte, 2, 15),
    }
}

/// `float8_e4m3fnuz`: no infinity, no negative zero, whose code is NaN.
pub(super) fn e4m3_fnuz(byte: u8) -> f32 {
    if byte == 0x80 { f32::NAN } else { finite(byte, 3, 8) }
}

/// `float8_e5m2fnuz`: the same with two bits of mantissa.
pub(super) fn e5m2_fnuz(byte: u8) -> f32 {
    if byte == 0x80 { f32::NAN } else { finite(byte, 2, 16) }
}

/// `float8_e8m0fnu`: a power of two.
pub(super) fn e8m0(byte: u8) -> f32 {
    match byte {
        // Below the normal numbers.
        0 => f32::from_bits(0x0040_0000),
        0xFF => f32::NAN,
        _ => power_of_two(i32::from(byte) - 127),
    }
}
