//! Image files: PNG and JPEG as pixels, and the folders that they lie in.

use std::{
    fs,
    path::{Path, PathBuf},
};

use x_transformers::{Error, ErrorKind, Result as LibraryResult, io::read_limited, train::Image};

use crate::failure::{Failure, Result};

/// Bytes that an image file may have.
const MAX_FILE: u64 = 256 << 20;
/// Folders within folders.
const MAX_DEPTH: usize = 32;
/// Endings of images in formats that are not read: to leave them out in silence would train on other data than meant.
const OTHER_FORMATS: [&str; 9] = ["avif", "bmp", "gif", "heic", "pgm", "ppm", "tif", "tiff", "webp"];

/// Reads an image: greyscale stays so, palettes become RGB, transparency is dropped, 16 bits become the upper 8. Of an
/// animation it is the first picture.
pub fn read(path: &Path) -> LibraryResult<Image> {
    decode(path, &read_limited(path, MAX_FILE)?)
}

/// Returns the bytes of an image file.
pub fn bytes(path: &Path) -> LibraryResult<Vec<u8>> {
    read_limited(path, MAX_FILE)
}

/// Decodes the content of a file.
pub fn decode(path: &Path, bytes: &[u8]) -> LibraryResult<Image> {
    let wrong = |why: String| Error::new(ErrorKind::File { path: path.to_path_buf(), why });
    // The decoders are fuzzed, but a bug in one must not end a run without the name of the file.
    let decoded = std::panic::catch_unwind(|| decoders::decode(bytes));
    let decoded = decoded.unwrap_or_else(|_| Err("cannot be decoded".to_string()));
    let decoders::Decoded { width, height, channels, pixels } = decoded.map_err(wrong)?;
    Image::new(width, height, channels, pixels)
}

#[cfg(feature = "images")]
mod decoders {
    use std::io::Cursor;

    use png::{ColorType, Transformations};
    use zune_jpeg::{
        JpegDecoder,
        zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions},
    };

    /// Pixels that an image may have; its width and height can be chosen by whoever wrote the file.
    pub const MAX_PIXELS: usize = 1 << 26;

    /// Pixels of a decoded file.
    pub struct Decoded {
        pub width: usize,
        pub height: usize,
        pub channels: usize,
        pub pixels: Vec<u8>,
    }

    /// Decodes a PNG or JPEG by its first bytes.
    pub fn decode(bytes: &[u8]) -> Result<Decoded, String> {
        match bytes {
            [0x89, b'P', b'N', b'G', ..] => png(bytes),
            [0xff, 0xd8, ..] => jpeg(bytes),
            [] => Err("is empty".to_string()),
            _ => Err("is not a PNG or JPEG file; convert it to one".to_string()),
        }
    }

    fn small(width: usize, height: usize) -> Result<(), String> {
        match width.checked_mul(height) {
            Some(1..=MAX_PIXELS) => Ok(()),
            _ => Err(format!("has {width} x {height} pixels, expected at most {MAX_PIXELS}; make it smaller")),
        }
    }

    fn png(bytes: &[u8]) -> Result<Decoded, String> {
        let damaged = |error: png::DecodingError| format!("is a damaged PNG: {error}");
        let mut decoder = png::Decoder::new(Cursor::new(bytes));
        decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
        decoder.set_ignore_text_chunk(true);
        decoder.set_ignore_iccp_chunk(true);
        let mut reader = decoder.read_info().map_err(damaged)?;
        let (width, height) = (reader.info().width as usize, reader.info().height as usize);
        small(width, height)?;
        let size = reader.output_buffer_size().ok_or("is too large")?;
        let mut pixels = vec![0; size];
        let frame = reader.next_frame(&mut pixels).map_err(damaged)?;
        if (frame.width as usize, frame.height as usize) != (width, height) {
            return Err(
                "is an animation whose first picture does not fill it; write it as a PNG of its own".to_string()
            );
        }
        pixels.truncate(frame.buffer_size());
        let (from, channels) = match frame.color_type {
            ColorType::Grayscale => (1, 1),
            ColorType::GrayscaleAlpha => (2, 1),
            ColorType::Rgb => (3, 3),
            ColorType::Rgba => (4, 3),
            ColorType::Indexed => return Err("is a damaged PNG: its palette is missing".to_string()),
        };
        if from > channels {
            pixels = pixels.chunks_exact(from).flat_map(|pixel| pixel[..channels].iter().copied()).collect();
        }
        Ok(Decoded { width, height, channels, pixels })
    }

    fn jpeg(bytes: &[u8]) -> Result<Decoded, String> {
        let damaged = |error: zune_jpeg::errors::DecodeErrors| format!("is a damaged JPEG: {error}");
        let most = usize::from(u16::MAX);
        // Strictly: a file that was cut short is an error, not a picture with a grey part.
        let options = DecoderOptions::default().set_strict_mode(true).set_max_width(most).set_max_height(most);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
        decoder.decode_headers().map_err(damaged)?;
        let info = decoder.info().ok_or("is a damaged JPEG")?;
        let (width, height) = (usize::from(info.width), usize::from(info.height));
        small(width, height)?;
        let (space, channels) = match decoder.input_colorspace() {
            Some(ColorSpace::Luma) => (ColorSpace::Luma, 1),
            Some(ColorSpace::YCbCr | ColorSpace::RGB) => (ColorSpace::RGB, 3),
            Some(ColorSpace::CMYK | ColorSpace::YCCK) => {
                return Err("is a JPEG in the colours of a printer (CMYK); convert it to RGB".to_string());
            }
            other => return Err(format!("is a JPEG in the colours {other:?}; convert it to RGB")),
        };
        decoder.set_options(options.jpeg_set_out_colorspace(space));
        let pixels = decoder.decode().map_err(damaged)?;
        Ok(Decoded { width, height, channels, pixels })
    }
}

#[cfg(not(feature = "images"))]
mod decoders {
    /// Pixels of a decoded file.
    pub struct Decoded {
        pub width: usize,
        pub height: usize,
        pub channels: usize,
        pub pixels: Vec<u8>,
    }

    /// Refuses every file.
    pub fn decode(_bytes: &[u8]) -> Result<Decoded, String> {
        Err("cannot be read, because `xt` was built without the feature `images`".to_string())
    }
}

/// Images of a folder of folders, and the names of these, which are the classes.
pub struct Classes {
    /// Files and their classes.
    pub files: Vec<(PathBuf, usize)>,
    pub names: Vec<String>,
}

impl Classes {
    /// Finds the images: the subfolders are the classes in order of their names, as in torchvision's `ImageFolder`.
    pub fn open(folder: &Path) -> Result<Self> {
        let (mut files, mut names) = (Vec::new(), Vec::new());
        for path in entries(folder)? {
            if !path.is_dir() || is_hidden(&path) {
                continue;
            }
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                return Err(Failure::new("expected a name in UTF-8, which is the name of a class").within(&path));
            };
            let before = files.len();
            find(&path, &mut |file| files.push((file, names.len())))?;
            if files.len() == before {
                return Err(Failure::new("has no PNG or JPEG file; add some, or remove the class").within(&path));
            }
            names.push(name.to_string());
        }
        if names.len() < 2 {
            let why = format!("has {} folders with images, expected at least 2, one for each class", names.len());
            return Err(Failure::new(why).within(folder));
        }
        Ok(Self { files, names })
    }
}

/// Gives the images in a folder and in the folders in it.
fn find(folder: &Path, take: &mut dyn FnMut(PathBuf)) -> Result<()> {
    walk(folder, 0, &mut |_, entries| {
        for path in entries {
            let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
            match &*ending {
                "png" | "jpg" | "jpeg" => take(path.clone()),
                other if OTHER_FORMATS.contains(&other) => {
                    return Err(Failure::new("is not a PNG or JPEG file; convert it to one").within(path));
                }
                _ => {}
            }
        }
        Ok(())
    })
}

/// Calls a function with a folder and the files in it, and then with the folders in it, all in order of their names.
pub fn walk(folder: &Path, depth: usize, take: &mut dyn FnMut(&Path, &[PathBuf]) -> Result<()>) -> Result<()> {
    if depth > MAX_DEPTH {
        let why = format!("is more than {MAX_DEPTH} folders deep; is there a link to itself?");
        return Err(Failure::new(why).within(folder));
    }
    let shown = entries(folder)?.into_iter().filter(|path| !is_hidden(path));
    let (folders, files): (Vec<PathBuf>, Vec<PathBuf>) = shown.partition(|path| path.is_dir());
    take(folder, &files)?;
    folders.iter().try_for_each(|folder| walk(folder, depth + 1, take))
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error: std::io::Error| Failure::io(folder, &error);
    let entries = fs::read_dir(folder).map_err(failed)?;
    let mut paths = entries.map(|entry| entry.map(|entry| entry.path()).map_err(failed)).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

#[cfg(all(test, feature = "images"))]
mod tests {
    use x_transformers::{io::read_safetensors, train::ImageTransform};

    use super::*;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/files/images")
    }

    /// PNG files give PIL's pixels; a JPEG may differ by rounding.
    #[test]
    fn files_are_decoded_as_by_pil() {
        let expected = read_safetensors(folder().join("expected.safetensors")).expect("the pixels");
        let mut seen = 0;
        for (key, pixels) in &expected {
            let Some(name) = key.strip_suffix(".pixels") else { continue };
            let image = read(&folder().join(name)).unwrap_or_else(|why| panic!("{why}"));
            let (height, width) = (pixels.shape()[0], pixels.shape()[1]);
            assert_eq!(image.size(), [width, height], "{name}");
            let expected: Vec<i32> =
                pixels.to_f64_vec().expect("values").into_iter().map(|value| value as i32).collect();
            let channels = image.pixels().len() / width / height;
            let differences = expected.iter().enumerate().map(|(at, value)| {
                let own = image.pixels()[if channels == 1 { at / 3 } else { at }];
                (i32::from(own) - value).abs()
            });
            let most = differences.max().expect("pixels");
            let allowed = if name.contains(".jp") { 4 } else { 0 };
            assert!(most <= allowed, "{name}: {most}");
            seen += 1;
        }
        assert_eq!(seen, 13);
        let message = read(&folder().join("cmyk.jpg")).unwrap_err().to_string();
        assert!(message.contains("cmyk.jpg") && message.contains("convert it to RGB"), "{message}");
    }

    /// Files that are cut or changed are an error or another picture: no panic, and no size that was only claimed.
    #[test]
    fn damaged_files_do_no_harm() {
        let mut refused = 0;
        for path in entries(&folder()).expect("a folder") {
            let Ok(image) = read(&path) else { continue };
            let bytes = bytes(&path).expect("a file");
            for cut in 0..bytes.len() - 16 {
                let cut = decoders::decode(&bytes[..cut]);
                // A JPEG may end early, and the first picture of an animation before the others.
                let whole = ["jp", "animated"].iter().any(|part| path.to_string_lossy().contains(part));
                assert!(cut.is_err() || whole, "{}", path.display());
            }
            for at in 0..bytes.len() {
                for mask in [1, 0x80, 0xff] {
                    let mut changed = bytes.clone();
                    changed[at] ^= mask;
                    match decoders::decode(&changed) {
                        Ok(decoded) => assert!(decoded.pixels.len() <= 3 * decoders::MAX_PIXELS),
                        Err(_) => refused += 1,
                    }
                }
            }
            assert!(ImageTransform::new(4, 3).crop(&image).is_ok());
        }
        assert!(refused > 1000, "{refused}");
    }
}
