// What a calibration came to.

import { keepShown } from "./part.js";

keepShown("calibrated");
