//! The emulated card through the driver's functions, for the tests of the emulator.

use std::ffi::{CStr, CString, c_char, c_void};

use cudarc::{
    driver::{
        result::{self, DriverError, stream::StreamKind},
        sys::{self, CUresult},
    },
    nvrtc,
};

/// A current context and a stream.
pub struct Card {
    pub stream: sys::CUstream,
}

/// Device memory, freed by [`Card::free`] only: a test may want to use it afterwards.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub bytes: usize,
}

pub struct Kernel(pub sys::CUfunction);

/// Returns a function that the emulator exports.
pub fn exported<F: Copy>(name: &str) -> F {
    // SAFETY: the caller names a function of tests/emulator and its type.
    let symbol = unsafe { sys::culib().get::<F>(name.as_bytes()) };
    *symbol.unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Returns the emulator's last report.
pub fn report() -> String {
    let get: unsafe extern "C" fn() -> *const c_char = exported("xt_emulator_report");
    // SAFETY: the function returns a text that lives until the next call of this thread.
    unsafe { CStr::from_ptr(get()) }.to_string_lossy().into_owned()
}

pub fn live_bytes() -> u64 {
    let get: unsafe extern "C" fn() -> u64 = exported("xt_emulator_live_bytes");
    // SAFETY: it has no conditions.
    unsafe { get() }
}

/// The bytes of a kernel's argument.
pub fn arg<V: bytemuck::Pod>(value: V) -> Vec<u8> {
    bytemuck::bytes_of(&value).to_vec()
}

/// Compiles to machine code for `sm_<architecture>`, or returns the compiler's result and log. `source` may include the
/// files of `kernels/`.
pub fn compile_for(architecture: u32, source: &str, options: &[&str]) -> Result<Vec<u8>, String> {
    compile_as(&format!("sm_{architecture}"), source, options)
}

/// The same for a target by its name, like `sm_90a`.
pub fn compile_as(target: &str, source: &str, options: &[&str]) -> Result<Vec<u8>, String> {
    // Of the folder that tests run in: this one may have been built elsewhere.
    let kernels = std::path::Path::new("kernels");
    let read = |name: &str| match name {
        "test.cu" => Some(source.to_string()),
        _ => std::fs::read_to_string(kernels.join(name)).ok(),
    };
    let text = CString::new(crate::build::flatten("test.cu", &read)?).unwrap();
    let program = nvrtc::result::create_program(&text, Some(c"test.cu")).unwrap();
    let mut arguments = vec![format!("--gpu-architecture={target}")];
    arguments.extend(options.iter().map(|option| option.to_string()));
    // SAFETY: the program was created above, and its source lives until the end.
    unsafe {
        let compiled = nvrtc::result::compile_program(program, &arguments);
        let log = nvrtc::result::get_program_log(program).unwrap();
        let code = compiled.map(|()| nvrtc::result::get_ptx(program).unwrap());
        nvrtc::result::destroy_program(program).unwrap();
        let log: Vec<u8> = log.iter().map(|&c| c as u8).collect();
        code.map(|code| code.iter().map(|&c| c as u8).collect())
            .map_err(|error| format!("{error:?}: {}", String::from_utf8_lossy(&log)))
    }
}

impl Card {
    pub fn open() -> Self {
        result::init().unwrap();
        let device = result::device::get(0).unwrap();
        // SAFETY: the device exists; the context is never released.
        unsafe { result::ctx::set_current(result::primary_ctx::retain(device).unwrap()) }.unwrap();
        Self { stream: result::stream::create(StreamKind::NonBlocking).unwrap() }
    }

    pub fn load(&self, code: &[u8]) -> Result<sys::CUmodule, DriverError> {
        // SAFETY: the code is whole.
        unsafe { result::module::load_data(code.as_ptr().cast()) }
    }

    pub fn kernel(&self, source: &str, name: &str, options: &[&str]) -> Kernel {
        self.kernel_as("sm_80", source, name, options)
    }

    pub fn kernel_as(&self, target: &str, source: &str, name: &str, options: &[&str]) -> Kernel {
        let code = compile_as(target, source, options).unwrap_or_else(|error| panic!("{error}"));
        let module = self.load(&code).unwrap();
        // SAFETY: the module stays loaded.
        Kernel(unsafe { result::module::get_function(module, CString::new(name).unwrap()) }.unwrap())
    }

    pub fn empty(&self, bytes: usize) -> Buffer {
        // SAFETY: the memory is given to a buffer.
        Buffer { address: unsafe { result::malloc_sync(bytes) }.unwrap(), bytes }
    }

    pub fn upload<V: bytemuck::Pod>(&self, values: &[V]) -> Buffer {
        let buffer = self.empty(size_of_val(values));
        // SAFETY: the buffer has this size.
        unsafe { result::memcpy_htod_sync(buffer.address, values) }.unwrap();
        buffer
    }

    pub fn try_read<V: bytemuck::Pod>(&self, buffer: Buffer) -> Result<Vec<V>, DriverError> {
        let mut values = vec![V::zeroed(); buffer.bytes / size_of::<V>()];
        // SAFETY: the emulator checks that there are as many bytes.
        unsafe { result::memcpy_dtoh_sync(&mut values, buffer.address) }?;
        Ok(values)
    }

    pub fn read<V: bytemuck::Pod>(&self, buffer: Buffer) -> Vec<V> {
        self.try_read(buffer).unwrap_or_else(|error| panic!("{error:?}: {}", report()))
    }

    pub fn free(&self, buffer: Buffer) {
        // SAFETY: what uses it afterwards is what the emulator shall find.
        unsafe { result::free_sync(buffer.address) }.unwrap();
    }

    pub fn try_launch(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &[Vec<u8>],
    ) -> Result<(), CUresult> {
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(|bytes| bytes.as_ptr().cast_mut().cast()).collect();
        let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
        // SAFETY: the emulator checks what kernels do with their arguments.
        unsafe { result::launch_kernel(kernel.0, (gx, gy, gz), (bx, by, bz), shared, self.stream, &mut pointers) }
            .map_err(|error| error.0)
    }

    pub fn launch(&self, kernel: &Kernel, blocks: u32, block: [u32; 3], arguments: &[Vec<u8>]) {
        let outcome = self.try_launch(kernel, [blocks, 1, 1], block, 0, arguments);
        assert!(outcome.is_ok(), "{outcome:?}: {}", report());
    }
}
