//! llama.cpp's quantiser, for files of types that nobody publishes in a small size.

use std::ffi::CString;

use llama_cpp_sys_2 as sys;

use crate::Result;

/// File types by the names that `llama-quantize` takes. A name without a size means the medium mixture.
fn file_type(name: &str) -> Option<sys::llama_ftype> {
    Some(match name {
        "F32" => sys::LLAMA_FTYPE_ALL_F32,
        "F16" => sys::LLAMA_FTYPE_MOSTLY_F16,
        "BF16" => sys::LLAMA_FTYPE_MOSTLY_BF16,
        "Q8_0" => sys::LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0" => sys::LLAMA_FTYPE_MOSTLY_Q4_0,
        "Q4_1" => sys::LLAMA_FTYPE_MOSTLY_Q4_1,
        "Q5_0" => sys::LLAMA_FTYPE_MOSTLY_Q5_0,
        "Q5_1" => sys::LLAMA_FTYPE_MOSTLY_Q5_1,
        "Q2_K" => sys::LLAMA_FTYPE_MOSTLY_Q2_K,
        "Q2_K_S" => sys::LLAMA_FTYPE_MOSTLY_Q2_K_S,
        "Q3_K_S" => sys::LLAMA_FTYPE_MOSTLY_Q3_K_S,
        "Q3_K" | "Q3_K_M" => sys::LLAMA_FTYPE_MOSTLY_Q3_K_M,
        "Q3_K_L" => sys::LLAMA_FTYPE_MOSTLY_Q3_K_L,
        "Q4_K_S" => sys::LLAMA_FTYPE_MOSTLY_Q4_K_S,
        "Q4_K" | "Q4_K_M" => sys::LLAMA_FTYPE_MOSTLY_Q4_K_M,
        "Q5_K_S" => sys::LLAMA_FTYPE_MOSTLY_Q5_K_S,
        "Q5_K" | "Q5_K_M" => sys::LLAMA_FTYPE_MOSTLY_Q5_K_M,
        "Q6_K" => sys::LLAMA_FTYPE_MOSTLY_Q6_K,
        "IQ4_NL" => sys::LLAMA_FTYPE_MOSTLY_IQ4_NL,
        "IQ4_XS" => sys::LLAMA_FTYPE_MOSTLY_IQ4_XS,
        _ => return None,
    })
}

/// Quantises a file, which may be quantised already. With `pure`, every matrix gets the type of the file.
pub fn run(input: &str, output: &str, name: &str, threads: usize, pure: bool) -> Result<()> {
    let ftype = file_type(name).ok_or(format!("unknown type {name}"))?;
    let (from, to) = (CString::new(input)?, CString::new(output)?);
    // SAFETY: both strings end in a zero and outlive the call; the parameters are llama.cpp's own with other values.
    let status = unsafe {
        let mut params = sys::llama_model_quantize_default_params();
        params.nthread = threads as i32;
        params.ftype = ftype;
        params.allow_requantize = true;
        params.pure_ = pure;
        sys::llama_model_quantize(from.as_ptr(), to.as_ptr(), &params)
    };
    if status != 0 {
        return Err(format!("llama.cpp cannot quantise {input}").into());
    }
    println!("{{\"file\": {output:?}, \"type\": {name:?}, \"file_bytes\": {}}}", std::fs::metadata(output)?.len());
    Ok(())
}
